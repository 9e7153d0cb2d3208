"""Reductions of member scores to one score per index, and normalisers that make groups comparable.

Both are small functions by name, or functions of the caller's; any goes with any criterion:

    scores = normaliser_of(n)(reduction_of(r)(torch.stack(criterion(...))))          # [size of the group]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])
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


def sentinel(fraction: float) -> Normaliser:
    """Divide by the score that so large a fraction of the group is below: that of rank ``int(N * fraction)`` of N."""

    def normalise(scores: Tensor) -> Tensor:
        return _ratio(scores, torch.sort(scores).values[int(len(scores) * fraction)])

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
# Those with a number: ``sentinel-0.25``, ``top-0.1``. By name: how it is made, and which fractions it takes.
FRACTIONS: dict[str, tuple[Callable[[float], Normaliser], Callable[[float], bool], str]] = {
    "sentinel": (sentinel, lambda x: 0 <= x < 1, "[0, 1)"),
    "top": (top, lambda x: 0 < x <= 1, "(0, 1]"),
}

# ---------------------------------------------------------------------- by name


def reduction_of(chosen: str | Reduction) -> Reduction:
    """Return a reduction: a function as it is, or one of `REDUCTIONS` by name.

    Raises:
        ValueError: There is none of this name.
    """
    return _named("reduction", chosen, REDUCTIONS, REDUCTIONS)


def normaliser_of(chosen: str | Normaliser) -> Normaliser:
    """Return a normaliser: a function as it is, one of `NORMALISERS` by name, or one of `FRACTIONS` as ``sentinel-0.25``.

    Raises:
        ValueError: There is none of this name, or its fraction is out of range.
    """
    found = re.fullmatch(rf"({'|'.join(FRACTIONS)})-(\d*\.?\d+)", chosen) if isinstance(chosen, str) else None
    if found is None:
        return _named("normaliser", chosen, NORMALISERS, [*NORMALISERS, *(f"{name}-FRACTION" for name in FRACTIONS)])
    make, takes, span = FRACTIONS[found.group(1)]
    fraction = float(found.group(2))
    if not takes(fraction):
        raise ValueError(f"normaliser {found.group(1)} takes a fraction in {span}, got {chosen!r}")
    return make(fraction)


def _named(what: str, chosen: str | F, known: Mapping[str, F], listed: Iterable[str]) -> F:
    if not isinstance(chosen, str) and callable(chosen):
        return chosen
    if not isinstance(chosen, str) or chosen not in known:
        raise ValueError(f"{what} must be one of {', '.join(listed)}, or a function given from Python, got {chosen!r}")
    return known[chosen]
