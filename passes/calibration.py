"""Calibration: gradients of a loss for the criteria that need them, without touching the caller's parameters."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
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
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    squared_means: dict[str, Tensor] = field(default_factory=dict)


def calibrate(program: Program, ctx: Context, squares: bool = False) -> Gradients:
    """Return the gradients of ``ctx.loss`` over ``ctx.batches``.

    Each batch is one sample, unless squares are asked for and ``ctx.split`` takes batches apart. Gradients are taken
    for copies of the parameters' handles, so neither the caller's ``.grad`` nor a frozen parameter's
    ``requires_grad`` changes.

    Raises:
        PreconditionError: There is no loss or batch, or a loss is not a finite scalar that depends on the program.
    """
    if ctx.loss is None or not ctx.batches:
        raise PreconditionError("a gradient criterion needs calibration: give Context(loss=..., batches=[...])")
    scratch, named = _handles(program)
    leaves = distinct(named.values())
    sums: dict[int, Tensor] = {}
    squared: dict[int, Tensor] = {}
    samples = 0
    for i, batch in enumerate(ctx.batches):
        for sample in _samples(ctx, batch, squares):
            with torch.enable_grad():
                loss = ctx.loss(scratch, sample)
            _check_loss(loss, i)
            samples += 1
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
                if grad is not None:
                    _add(sums, id(leaf), grad)
                    if squares:
                        _add(squared, id(leaf), grad.to(torch.promote_types(grad.dtype, torch.float32)) ** 2)
        ctx.report("calibration", i + 1, len(ctx.batches))
    return Gradients(
        {name: sums[id(p)] for name, p in named.items() if id(p) in sums},
        {name: squared[id(p)] / samples for name, p in named.items() if id(p) in squared},
    )


def _handles(program: Program) -> tuple[Program, dict[str, nn.Parameter]]:
    """Return a copy of ``program`` with parameters of its own that share the memory, and these by name."""
    scratch = program.copy()
    handles: dict[Hashable, nn.Parameter] = {}
    named: dict[str, nn.Parameter] = {}
    for name, parameter in program.parameters().items():
        if parameter.is_floating_point() or parameter.is_complex():
            named[name] = handles.setdefault(tensor_identity(parameter), nn.Parameter(parameter.detach()))
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
