"""Channels that a removal takes to another group of a group norm.

A group norm after a concatenation (a U-Net's skip connections) may have groups that lie across the pieces. Equal numbers
from every group cannot be had there without tying the pieces to one another, so after a removal some of the channels that
stay are normalised together with others than before. The result is a valid network; this says which norms are concerned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .depgraph import DepGraph, check_keep
from .errors import module_path
from .rules import Resizer


@dataclass(frozen=True)
class Regrouped:
    """A group norm some of whose channels are in another group than before.

    Attributes:
        norm: Module path, or the node's name where it is of no module.
        moved: How many of the channels that stay are in another group.
        kept: How many stay.
    """

    norm: str
    moved: int
    kept: int


def regrouped_norms(graph: DepGraph, keep: Mapping[str, Any]) -> tuple[Regrouped, ...]:
    """Return the group norms in which channels change their group when only ``keep`` stays, in graph order.

    Args:
        graph: Coupling analysis of the program before the removal.
        keep: As for `resize`.
    """
    rz = Resizer(graph.analysis, check_keep(graph, dict(keep)))
    found = []
    for constraint in graph.analysis.constraints:
        kept = rz.kept(constraint.axis)
        if kept is None or len(kept) % constraint.groups:
            continue
        before = np.asarray(kept) // (int(constraint.axis.size) // constraint.groups)
        after = np.arange(len(kept)) // (len(kept) // constraint.groups)
        moved = int((before != after).sum())
        if moved:
            name = module_path(constraint.node)[0] or constraint.node.name
            found.append(Regrouped(name, moved, len(kept)))
    return tuple(found)


__all__ = ["Regrouped", "regrouped_norms"]
