"""Calibration: gradients of a loss for the criteria that need them, without touching the caller's parameters."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.errors import PreconditionError
from ..graph.program import Program, distinct, set_tensor, tensor_identity
from .base import Context


@dataclass(frozen=True)
class Gradients:
    """Calibration gradients by parameter name; parameters that the loss does not depend on are left out.

    Attributes:
        sums: Summed over the samples.
        squared_means: Mean over the samples of the squared gradient, element by element; empty unless asked for.
        losses: Of the samples that were looked at, in their order.
        used: Which of them the gradients are of.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    squared_means: dict[str, Tensor] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    used: tuple[int, ...] = ()


@dataclass(frozen=True)
class Threshold:
    """Which samples count: those whose loss is above a fraction of the largest loss so far.

    With one batch for each timestep of a diffusion model, least noise first, these are the timesteps that Diff-Pruning
    (arXiv 2305.10924) takes: late ones, whose loss is small, would add gradients of noise.

    Attributes:
        fraction: 0 takes every sample.
        stop: Whether the first sample that does not count ends the calibration. Else all are looked at, for losses that do
            not fall from sample to sample.
    """

    fraction: float = 0.0
    stop: bool = True

    def takes(self, losses: Sequence[float]) -> bool:
        """Whether the last of the losses counts."""
        return losses[-1] > self.fraction * max(losses) or self.fraction == 0


def calibrate(program: Program, ctx: Context, squares: bool = False, threshold: Threshold | None = None) -> Gradients:
    """Return the gradients of ``ctx.loss`` over ``ctx.batches``, or over those of them that ``threshold`` takes.

    Each batch is one sample, unless squares are asked for and ``ctx.split`` takes batches apart. Gradients are taken
    for copies of the parameters' handles, so neither the caller's ``.grad`` nor a frozen parameter's
    ``requires_grad`` changes.

    Raises:
        PreconditionError: There is no loss or batch, or a loss is not a finite scalar that depends on the program.
    """
    if ctx.loss is None or not ctx.batches:
        raise PreconditionError("a gradient criterion needs calibration: give Context(loss=..., batches=[...])")
    scratch, named = handles(program)
    leaves = distinct(named.values())
    totals = _Totals(leaves, squares)
    for i, batch in enumerate(ctx.batches):
        for sample in _samples(ctx, batch, squares):
            with torch.enable_grad():
                loss = ctx.loss(scratch, sample)
            _check_loss(loss, i)
            totals.losses.append(float(loss.detach()))
            if threshold is None or threshold.takes(totals.losses):
                totals.add(loss)
            elif threshold.stop:
                ctx.report("calibration", len(ctx.batches), len(ctx.batches))
                return totals.gradients(named)
        ctx.report("calibration", i + 1, len(ctx.batches))
    return totals.gradients(named)


class _Totals:
    """Sums up gradients of losses."""

    def __init__(self, leaves: list[Tensor], squares: bool) -> None:
        self.leaves, self.squares = leaves, squares
        self.sums: dict[int, Tensor] = {}
        self.squared: dict[int, Tensor] = {}
        self.losses: list[float] = []
        self.used: list[int] = []

    def add(self, loss: Tensor) -> None:
        """Add the gradients of the last of the losses."""
        self.used.append(len(self.losses) - 1)
        for leaf, grad in zip(self.leaves, torch.autograd.grad(loss, self.leaves, allow_unused=True), strict=True):
            if grad is not None:
                _add(self.sums, id(leaf), grad)
                if self.squares:
                    _add(self.squared, id(leaf), grad.to(torch.promote_types(grad.dtype, torch.float32)) ** 2)

    def gradients(self, named: Mapping[str, nn.Parameter]) -> Gradients:
        """Return the gradients by name."""
        return Gradients(
            {name: self.sums[id(p)] for name, p in named.items() if id(p) in self.sums},
            {name: self.squared[id(p)] / len(self.used) for name, p in named.items() if id(p) in self.squared},
            tuple(self.losses),
            tuple(self.used),
        )


def handles(program: Program) -> tuple[Program, dict[str, nn.Parameter]]:
    """Return a copy of ``program`` with parameters of its own that share the memory, and these by name."""
    scratch = program.copy()
    own: dict[Hashable, nn.Parameter] = {}
    named: dict[str, nn.Parameter] = {}
    for name, parameter in program.parameters().items():
        if parameter.is_floating_point() or parameter.is_complex():
            named[name] = own.setdefault(tensor_identity(parameter), nn.Parameter(parameter.detach()))
            set_tensor(scratch.graph_module, name, named[name])
    return scratch, named


def _samples(ctx: Context, batch: Any, squares: bool) -> Iterator[Any]:
    return iter(ctx.split(batch)) if squares and ctx.split is not None else iter((batch,))


def _add(totals: dict[int, Tensor], key: int, value: Tensor) -> None:
    totals[key] = totals[key] + value if key in totals else value


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
