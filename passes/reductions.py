"""Reductions of member scores to one score per index, and normalisers that make groups comparable.

Both are small functions by name; any goes with any criterion:

    scores = NORMALISERS[n](REDUCTIONS[r](torch.stack(criterion(...))))          # [size of the group]
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Reduction = Callable[[Tensor], Tensor]
Normaliser = Callable[[Tensor], Tensor]

# ---------------------------------------------------------------------- over members, [members, size] -> [size]

# ``first`` is the member that comes first in the graph, mostly the producer's weight; ``gate`` is the last one.
REDUCTIONS: dict[str, Reduction] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "prod": lambda scores: scores.prod(0),
    "first": lambda scores: scores[0],
    "gate": lambda scores: scores[-1],
}

# ---------------------------------------------------------------------- normalisers inside a group, [size] -> [size]


def _ratio(scores: Tensor, scale: Tensor) -> Tensor:
    """Divide, and leave what has no scale as it is: a small constant in the denominator would bend small scores."""
    return scores / torch.where(scale == 0, torch.ones_like(scale), scale)


def _lamp(scores: Tensor) -> Tensor:
    """Divide each score by the sum of those that are not smaller, itself included (LAMP, 2010.07611)."""
    ordered, order = torch.sort(scores, stable=True)
    tail = ordered.flip(0).cumsum(0).flip(0)
    out = torch.empty_like(scores)
    out[order] = _ratio(ordered, tail)
    return out


def top(fraction: float) -> Normaliser:
    """Divide by the mean of the largest scores: ``N * I / sum(TopN(I))``, N a fraction of the group (2301.12900)."""

    def normalise(scores: Tensor) -> Tensor:
        n = max(1, math.ceil(fraction * len(scores)))
        return _ratio(scores, scores.topk(n).values.mean())

    return normalise


NORMALISERS: dict[str, Normaliser] = {
    "none": lambda s: s,
    "sum": lambda s: _ratio(s, s.sum()),
    "mean": lambda s: _ratio(s, s.mean()),
    "max": lambda s: _ratio(s, s.amax()),
    "median": lambda s: _ratio(s, s.median()),
    "standardise": lambda s: _ratio(s - s.amin(), s.amax() - s.amin()),
    "gaussian": lambda s: _ratio(s - s.mean(), s.std(correction=min(1, len(s) - 1))),
    "lamp": _lamp,
    "top": top(0.5),
}
