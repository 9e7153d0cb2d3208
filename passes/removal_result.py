"""What a removal of channels tells: the widths of every group, who competed with whom, which norms were concerned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..graph.cost import Cost
from ..graph.norm_groups import Regrouped
from ..graph.resize import RemovalRecord
from .base import PassResult


@dataclass(frozen=True)
class GroupWidth:
    """What happened to one coupling group: its widths before and after, and what was asked for."""

    group: str
    kind: str
    before: int
    wanted: float
    after: int


@dataclass(frozen=True)
class RemovalResult(PassResult):
    """A `PassResult` that also says what happened to groups.

    Attributes:
        widths: Of every group.
        regrouped: Group norms whose channels changed their group.
        classes: In an isomorphic scope the groups that competed with each other. A class of one is ranked by itself, as in a
            local scope.
    """

    widths: tuple[GroupWidth, ...] = ()
    regrouped: tuple[Regrouped, ...] = ()
    classes: tuple[tuple[str, ...], ...] = ()


def members_of_classes(classes: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of each class, given the class of each group."""
    found: dict[str, list[str]] = {}
    for group, label in classes.items():
        found.setdefault(label, []).append(group)
    return tuple(map(tuple, found.values()))


def removal_stats(initial: Mapping[str, int], record: RemovalRecord, before: Cost, after: Cost) -> dict[str, float]:
    """Return what a removal took away, in counts.

    Args:
        initial: Widths of all groups before it.
        record: Of the removal.
        before: Cost of the program before it.
        after: Cost of what is left.
    """
    return {
        "groups": len(initial),
        "groups_shrunk": len(record.groups),
        "indices_before": sum(initial.values()),
        "indices_removed": sum(c.of - len(c.kept) for c in record.groups.values()),
        "parameters_before": before.parameters,
        "parameters_after": after.parameters,
        "macs_before": before.total_macs,
        "macs_after": after.total_macs,
    }
