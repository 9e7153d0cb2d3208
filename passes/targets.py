"""Targets: the least removal that brings a program's cost down to what was asked for.

All ratios are multiplied by one factor, so that their proportions stay, and the factor is searched by bisection over
programs that were really made smaller: constraints and alignment are counted in, no formula is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..graph.cost import cost
from ..graph.errors import PreconditionError
from ..graph.program import Program
from .base import Context

T = TypeVar("T")

# How close the factor is to the least that reaches the target. A latency is a measurement: its noise ends the search
# earlier than this.
PRECISION = 1e-3
LATENCY_TRIALS = 10


@dataclass(frozen=True)
class Target:
    """What is to come down, and to which fraction of what it was.

    Attributes:
        quantity: ``macs`` (products of attention included), ``parameters`` or ``latency``.
        fraction: Of the quantity before the pass that may stay, in (0, 1).
    """

    quantity: str
    fraction: float


def target_of(options: Mapping[str, float | None]) -> Target | None:
    """Return the one target among ``options``, quantity by quantity; None if there is none.

    Raises:
        ValueError: There are several, or one is not between 0 and 1.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"one target can be reached at a time, got {' and '.join(given)}")
    for name, value in given.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be a fraction in (0, 1) of what there is, got {value!r}")
        return Target(name, float(value))
    return None


def quantity_of(target: Target, program: Program, ctx: Context) -> float:
    """Return what the target is about: multiply-accumulates, parameters, or seconds of a call.

    Raises:
        PreconditionError: It is the latency, and the context has nothing that measures it.
    """
    if target.quantity == "latency":
        if ctx.latency is None:
            raise PreconditionError(
                "a latency target needs something that measures: give Context(latency=...), a function from a program to "
                "seconds; graphwright.tools.latency has two"
            )
        return ctx.latency(program)
    counted = cost(program)
    return float(counted.total_macs if target.quantity == "macs" else counted.parameters)


@dataclass(frozen=True)
class Trial(Generic[T]):
    """What came of one factor: the plan, and the quantity with it."""

    factor: float
    plan: T
    quantity: float


def solve(
    target: Target,
    goal: float,
    widest: float,
    plan: Callable[[float], T],
    quantity: Callable[[T], float],
    ctx: Context,
) -> Trial[T]:
    """Return the trial with the least factor that brings the quantity to ``goal`` or below.

    Args:
        target: For messages.
        goal: In the quantity's unit.
        widest: The largest factor that changes anything.
        plan: Makes the plan of a factor; removes no less for a larger one.
        quantity: Of the program that a plan leaves.
        ctx: Is told of the progress.

    Raises:
        PreconditionError: Even the widest factor leaves more.
    """
    trials = LATENCY_TRIALS if target.quantity == "latency" else 64
    low, best = 0.0, _tried(widest, plan, quantity)
    if best.quantity > goal:
        raise PreconditionError(
            f"{target.quantity}={target.fraction:g} asks for {goal:.6g} of {goal / target.fraction:.6g}, and the most "
            f"that the options allow leaves {best.quantity:.6g}: give ratios to more kinds of groups (head_ratio, "
            "head_dim_ratio), or raise max_ratio, lower min_width or ignore less"
        )
    seen = {repr(best.plan): best.quantity}
    for done in range(trials):
        if best.factor - low <= PRECISION * widest:
            break
        middle = (low + best.factor) / 2
        proposed = plan(middle)
        key = repr(proposed)
        if key not in seen:
            seen[key] = quantity(proposed)
        if seen[key] <= goal:
            best = Trial(middle, proposed, seen[key])
        else:
            low = middle
        ctx.report("target", done + 1, trials)
    return best


def _tried(factor: float, plan: Callable[[float], T], quantity: Callable[[T], float]) -> Trial[T]:
    proposed = plan(factor)
    return Trial(factor, proposed, quantity(proposed))


__all__ = ["Target", "Trial", "quantity_of", "solve", "target_of"]
