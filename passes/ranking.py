"""Ranking: from scores to the indices that stay, within a scope and under the constraints of each group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.groups import CouplingGroup

# How a width that constraints do not allow is rounded: to the nearest that they do; so that no more goes than was asked
# for; or so that no less goes.
ROUNDINGS = ("nearest", "floor-removed", "floor-kept")


@dataclass(frozen=True)
class Limits:
    """What bounds the kept width of every group.

    Attributes:
        max_ratio: At most this fraction of a group's initial indices goes.
        min_width: At least this many indices stay.
        round_to: Kept widths are multiples of this where the group's own constraints allow it.
        rounding: One of `ROUNDINGS`.
    """

    max_ratio: float = 1.0
    min_width: int = 1
    round_to: int = 1
    rounding: str = "nearest"


def legal_width(group: CouplingGroup, wanted: float, initial: int, limits: Limits) -> int:
    """Return the kept width for ``wanted`` that the group and the limits allow.

    Legal widths are ``group.size`` minus a multiple of ``group.step``, not below the floor. Among those, multiples of
    ``round_to`` are preferred; where there is none, the group stays as wide as it is. Of what is left, ``rounding``
    chooses the nearest, the narrowest that is not below the whole part of ``wanted``, or the widest not above it.
    """
    floor = least_width(group, initial, limits)
    widths = [w for w in range(group.size, floor - 1, -group.step)]
    # A group that would have to stay whole for alignment's sake may still do so: its own width is always legal.
    legal = [w for w in widths if w % limits.round_to == 0] or [group.size]
    if limits.rounding == "nearest":
        return min(legal, key=lambda w: (abs(w - wanted), -w))
    whole = int(wanted + 1e-9)
    if limits.rounding == "floor-removed":
        return min((w for w in legal if w >= whole), default=max(legal))
    return max((w for w in legal if w <= whole), default=min(legal))


def least_width(group: CouplingGroup, initial: int, limits: Limits) -> int:
    """Return the narrowest width that the limits allow, at most the group's own and at least 1."""
    return min(group.size, max(1, limits.min_width, initial - int(limits.max_ratio * initial + 1e-9)))


def local_widths(
    groups: Sequence[CouplingGroup], ratios: Mapping[str, float], initial: Mapping[str, int]
) -> dict[str, float]:
    """Every group keeps the same fraction of its initial width."""
    return {g.name: initial[g.name] * (1 - ratios[g.name]) for g in groups}


def global_widths(
    groups: Sequence[CouplingGroup],
    scores: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    initial: Mapping[str, int],
    limits: Limits = Limits(),
    classes: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """All indices of all groups compete: the lowest go until the overall fraction is gone.

    Groups with different ratios compete among those with the same ratio. The highest scores of each group, as many as
    must stay, do not compete, so that others go in their place. Of ``n`` indices ``n - int(n * (1 - ratio))`` go.

    Args:
        groups: That lose something.
        scores: By group.
        ratios: By group.
        initial: Widths at the beginning, by group.
        limits: For every group.
        classes: By group: only groups of one class compete, and each class loses the fraction.
    """
    widths: dict[str, float] = {}
    pools: dict[tuple[float, str], list[CouplingGroup]] = {}
    for group in groups:
        pools.setdefault((ratios[group.name], (classes or {}).get(group.name, "")), []).append(group)
    for (ratio, _), pool in pools.items():
        everything = torch.cat([_competing(scores[g.name], least_width(g, initial[g.name], limits)) for g in pool])
        total = sum(initial[g.name] for g in pool)
        remove = max(0, len(everything) - int(total * (1 - ratio) + 1e-9))
        # Positions, not a threshold: with equal scores a threshold removes all of them or none.
        lowest = torch.zeros(len(everything), dtype=torch.bool)
        lowest[torch.argsort(everything, stable=True)[:remove]] = True
        lowest &= ~torch.isinf(everything)
        offset = 0
        for group in pool:
            widths[group.name] = group.size - int(lowest[offset : offset + group.size].sum())
            offset += group.size
    return widths


def _competing(scores: Tensor, least: int) -> Tensor:
    """Return the scores with the ``least`` highest out of reach."""
    out = scores.clone()
    out[torch.argsort(scores, descending=True, stable=True)[:least]] = math.inf
    return out


def select(group: CouplingGroup, scores: Tensor, width: int) -> list[int]:
    """Return the sorted indices of the ``width`` highest scores, equally many from each block of the group.

    Blocks are the groups of a group norm: taking as many from each keeps every channel in its group.
    """
    blocks = group.blocks if group.size % group.blocks == 0 and width % group.blocks == 0 else 1
    size = group.size // blocks
    per_block = width // blocks
    order = torch.argsort(scores.view(blocks, size), dim=1, descending=True, stable=True)[:, :per_block]
    return sorted((order + torch.arange(blocks)[:, None] * size).flatten().tolist())
