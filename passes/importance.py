"""Importance: how much each index of a coupling group matters.

A criterion scores the slices of one member; a reduction combines the members of a group; a normaliser makes groups
comparable. Each is a small function, and any goes with any:

    scores = normalise(reduce([criterion(member) for member in group]))          # [size of the group]

Formulas and defaults follow docs/methods/depgraph.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.depgraph import CouplingGroup, Member
from ..graph.errors import PreconditionError
from ..graph.program import Program, set_tensor
from .base import Context

# Elements of a block of `power_sums`: 1 MiB of float32.
BLOCK = 1 << 18


@dataclass(frozen=True)
class Scoring:
    """What criteria read: tensors and, for gradient criteria, gradients, both by name."""

    tensors: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    _powers: dict[tuple[str, int], tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    def powers(self, name: str, p: int) -> tuple[Tensor, ...]:
        """Return `power_sums` of the tensor ``name``, computed once: it is a member of a group in every dimension."""
        if (name, p) not in self._powers:
            self._powers[name, p] = power_sums(self.tensors[name], p)
        return self._powers[name, p]


# A criterion gives one score vector per scored member, each [size of the group]; an empty list means it cannot judge.
Criterion = Callable[[Scoring, CouplingGroup, Sequence[Member]], list[Tensor]]
Reduction = Callable[[Tensor], Tensor]
Normaliser = Callable[[Tensor], Tensor]


def slice_sums(elements: Tensor, member: Member) -> Tensor:
    """Sum element scores over everything that goes with each index.

    Args:
        elements: Same shape as the member's tensor.
        member: Says which indices of which dimension belong to index ``i``.

    Returns:
        ``[size of the axis]``, float32.
    """
    others = [d for d in range(elements.dim()) if d != member.dim]
    return _gathered(elements.float().sum(others) if others else elements.float(), member)


def power_sums(tensor: Tensor, p: int) -> tuple[Tensor, ...]:
    """Sum ``|w| ** p`` over all dimensions but one, for each dimension, in one pass over the tensor.

    The pass goes by blocks that stay in cache: a temporary of the size of a large weight costs more than the sums.

    Returns:
        One vector a dimension, as long as the dimension, float32.
    """
    shape = tensor.shape
    rows = tensor.detach().reshape(shape[0], -1)
    first = torch.empty(shape[0], device=tensor.device)
    rest = torch.zeros(rows.shape[1], device=tensor.device)
    step = max(1, BLOCK // max(1, rows.shape[1]))
    for start in range(0, shape[0], step):
        block = rows[start : start + step]
        block = block.float() if p == 2 and not block.is_complex() else block.abs().float()
        block = block if p == 1 else block * block if p == 2 else block**p
        first[start : start + step] = block.sum(1)
        rest += block.sum(0)
    rest = rest.view(shape[1:])
    others = ([e for e in range(rest.dim()) if e != d] for d in range(rest.dim()))
    return first, *(rest.sum(dims) if dims else rest for dims in others)


def _gathered(line: Tensor, member: Member) -> Tensor:
    """Sum the entries of a dimension that belong to each index of the member's axis."""
    index = torch.from_numpy(member.positions()).to(line.device)
    return line[index].sum(1)


# ---------------------------------------------------------------------- criteria


def magnitude(p: int) -> Criterion:
    """Score a slice by the sum of ``|w| ** p`` (no root). Li et al., Pruning Filters for Efficient ConvNets, 1608.08710."""

    def score(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
        return [_gathered(scoring.powers(m.name, p)[m.dim], m) for m in members]

    return score


def random(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score by uniform random numbers, the same for the same seed and group."""
    generator = torch.Generator().manual_seed((scoring.seed * 1_000_003 + _stable_hash(group.name)) % (1 << 63))
    return [torch.rand(group.size, generator=generator)]


def taylor(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score a slice by ``sum |w * dL/dw|``: first-order change of the loss, element by element (1906.10771)."""
    return [slice_sums((w * g).abs(), m) for m, w, g in _with_gradients(scoring, members)]


def taylor_multivariable(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score a slice by ``|sum w * dL/dw|``: the loss change of removing the slice as a whole."""
    return [slice_sums(w * g, m).abs() for m, w, g in _with_gradients(scoring, members)]


def _with_gradients(scoring: Scoring, members: Sequence[Member]) -> list[tuple[Member, Tensor, Tensor]]:
    found = [m for m in members if m.name in scoring.gradients]
    return [(m, scoring.tensors[m.name].detach(), scoring.gradients[m.name]) for m in found]


def _stable_hash(text: str) -> int:
    # The built-in hash of a string differs from process to process.
    value = 0
    for char in text:
        value = (value * 131 + ord(char)) % (1 << 61)
    return value


CRITERIA: dict[str, Criterion] = {
    "magnitude-l1": magnitude(1),
    "magnitude-l2": magnitude(2),
    "random": random,
    "taylor": taylor,
    "taylor-multivariable": taylor_multivariable,
}
NEEDS_GRADIENTS = frozenset({"taylor", "taylor-multivariable"})

# ---------------------------------------------------------------------- reductions over members, [members, size] -> [size]


def _first(scores: Tensor) -> Tensor:
    return scores[0]


def _last(scores: Tensor) -> Tensor:
    return scores[-1]


REDUCTIONS: dict[str, Reduction] = {
    "sum": lambda s: s.sum(0),
    "mean": lambda s: s.mean(0),
    "max": lambda s: s.amax(0),
    "prod": lambda s: s.prod(0),
    "first": _first,
    "gate": _last,
}

# ---------------------------------------------------------------------- normalisers inside a group, [size] -> [size]

EPSILON = 1e-8


def _divided(by: Callable[[Tensor], Tensor]) -> Normaliser:
    def normalise(scores: Tensor) -> Tensor:
        scale = by(scores)
        return scores / scale if float(scale) != 0 else scores

    return normalise


def _lamp(scores: Tensor) -> Tensor:
    """Divide each score by the sum of all that are not smaller (LAMP, 2010.07611)."""
    ordered, order = torch.sort(scores)
    tail = ordered.flip(0).cumsum(0).flip(0)
    out = torch.empty_like(scores)
    out[order] = ordered / (tail + EPSILON)
    return out


def top(fraction: float) -> Normaliser:
    """Divide by the mean of the largest scores: ``N * I / sum(TopN(I))`` with N a fraction of the group (2301.12900)."""

    def normalise(scores: Tensor) -> Tensor:
        n = max(1, math.ceil(fraction * len(scores)))
        return scores / (scores.topk(n).values.mean() + EPSILON)

    return normalise


NORMALISERS: dict[str, Normaliser] = {
    "none": lambda s: s,
    "sum": _divided(lambda s: s.sum()),
    "mean": _divided(lambda s: s.mean()),
    "max": _divided(lambda s: s.amax()),
    "standardise": lambda s: (s - s.amin()) / (s.amax() - s.amin() + EPSILON),
    "gaussian": lambda s: (s - s.mean()) / (s.std(correction=min(1, len(s) - 1)) + EPSILON),
    "lamp": _lamp,
    "top": top(0.5),
}


# ---------------------------------------------------------------------- putting them together


def scored_members(group: CouplingGroup, include_bias: bool) -> tuple[Member, ...]:
    """Return the members a criterion looks at: parameters, without one-dimensional biases unless asked for."""
    chosen = tuple(m for m in group.parameters if include_bias or not m.name.rsplit(".", 1)[-1].endswith("bias"))
    return chosen or group.parameters


def importance(
    group: CouplingGroup,
    scoring: Scoring,
    criterion: str,
    reduction: str = "mean",
    normaliser: str = "none",
    include_bias: bool = False,
) -> Tensor:
    """Score every index of ``group``.

    Returns:
        ``[group.size]``, float32; higher matters more.

    Raises:
        PreconditionError: The criterion cannot judge the group (no member has a gradient), or a score is not finite.
    """
    members = scored_members(group, include_bias)
    if criterion != "random" and any(scoring.tensors[m.name].is_meta for m in members):
        raise PreconditionError(
            f"{criterion} reads weights, and {members[0].name!r} is on the meta device; "
            'load the weights, or plan with criterion="random"'
        )
    scores = CRITERIA[criterion](scoring, group, members)
    if not scores:
        raise PreconditionError(
            f"{criterion} cannot score the group {group.name!r}: no member of it received a gradient"
        )
    reduced = REDUCTIONS[reduction](torch.stack([s.float().cpu() for s in scores]))
    result = NORMALISERS[normaliser](reduced)
    if not bool(torch.isfinite(result).all()):
        raise PreconditionError(f"{criterion} gives scores that are not finite for the group {group.name!r}")
    return result


def calibration_gradients(program: Program, ctx: Context) -> dict[str, Tensor]:
    """Return the gradients of ``ctx.loss``, summed over ``ctx.batches``, by parameter name.

    Gradients are taken for copies of the parameters' handles, so neither the caller's ``.grad`` nor a frozen
    parameter's ``requires_grad`` changes.

    Raises:
        PreconditionError: There is no loss or batch, or the loss is not a finite scalar.
    """
    if ctx.loss is None or not ctx.batches:
        raise PreconditionError("a gradient criterion needs calibration: give Context(loss=..., batches=[...])")
    scratch = program.copy()
    handles: dict[int, nn.Parameter] = {}
    named: dict[str, nn.Parameter] = {}
    for name, parameter in program.parameters().items():
        if not parameter.is_floating_point():
            continue
        named[name] = handles.setdefault(id(parameter), nn.Parameter(parameter.detach()))
        set_tensor(scratch.graph_module, name, named[name])
    leaves = list(handles.values())
    totals: list[Tensor | None] = [None] * len(leaves)
    for i, batch in enumerate(ctx.batches):
        with torch.enable_grad():
            loss = ctx.loss(scratch, batch)
        _check_loss(loss, i)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        totals = [g if t is None else t if g is None else t + g for t, g in zip(totals, grads, strict=True)]
        ctx.report("calibration", i + 1, len(ctx.batches))
    by_handle = {id(p): g for p, g in zip(leaves, totals, strict=True) if g is not None}
    return {name: by_handle[id(p)] for name, p in named.items() if id(p) in by_handle}


def _check_loss(loss: Any, batch: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise PreconditionError(f"the calibration loss must be a scalar tensor, got {got} for batch {batch}")
    if not bool(torch.isfinite(loss)):
        raise PreconditionError(
            f"the calibration loss is {loss.item()} for batch {batch}; check the batch and the weights"
        )
    if not loss.requires_grad:
        raise PreconditionError(
            "the calibration loss does not depend on the program's parameters; call the program in it"
        )
