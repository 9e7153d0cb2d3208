"""Cache of residual branches: attention and feed-forward results of an earlier evaluation stand in for new ones.

before: h = x + gate * f(x)
after:  refresh: r = f(x); h = x + gate * r; return ..., r
        reuse:   h = x + gate * r, with the r of an earlier evaluation; stream and gate are those of this one

Which branches are reused at which evaluation is a list, as Learning-to-Cache (arXiv 2406.01733) learns it, or all of some
kind at every evaluation but each N-th, as in FORA (arXiv 2407.01425), or at those that a schedule says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..graph.cost import cost
from ..graph.errors import PreconditionError
from ..graph.joins import ResidualJoin, residual_joins
from ..graph.plan import Plan
from ..graph.program import Program
from ..graph.schedules import REFRESH, REUSE, Listed, Schedule, Uniform
from .base import Context, Pass, PassResult
from .cache_cuts import cut_stages, require_order, require_timestep

KINDS = ("attention", "mlp")
# Of the names of registers.
BRANCH = "cached_branch_"


@dataclass(frozen=True)
class InsertLayerCache(Pass):
    """Take chosen residual branches from the last full evaluation.

    Attributes:
        reuse: For every evaluation of a run the numbers of the branches to take, in graph order; an empty entry is a
            full evaluation, and so must be the first. Given, it fixes the number of evaluations.
        interval_steps: Without ``reuse``: a full evaluation every so many steps.
        schedule: Takes the place of ``interval_steps`` where it is given, such as `step_mask`; not with ``reuse``.
        kinds: Without ``reuse``: the kinds of branches that all other evaluations take.
        expected: With ``reuse``: the kinds of all branches of the model that the list was made for; a model with
            others is refused. Empty for any.
        timestep: Name of the input that holds the time.
        extrapolation: Reuse the polynomial of this order through the last kept values, not the last value (TaylorSeer, arXiv
            2503.06923). It takes as many times the memory, and one more.
    """

    name: ClassVar[str] = "insert-layer-cache"

    reuse: tuple[tuple[int, ...], ...] = ()
    interval_steps: int = 2
    kinds: tuple[str, ...] = KINDS
    expected: tuple[str, ...] = ()
    timestep: str = "timestep"
    extrapolation: int = 0
    schedule: Uniform | Listed | None = None

    def __post_init__(self) -> None:
        if self.reuse and self.schedule is not None:
            raise ValueError("reuse says what every evaluation takes, and schedule too: give one of them")

    def requires(self, program: Program) -> None:
        joins = residual_joins(program)
        if not joins:
            raise PreconditionError(
                f"{self.name} needs residual branches with layers in them, and {program.name} has none; for a U-Net use "
                "insert-feature-cache"
            )
        used = {number for numbers in self.reuse for number in numbers}
        if beyond := sorted(used - set(range(len(joins)))):
            raise PreconditionError(
                f"{self.name} has no branch {beyond[0]}: {program.name} has {len(joins)}, numbered from 0 to {len(joins) - 1}"
            )
        if self.expected:
            require_kinds(self.name, self.expected, program)
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise PreconditionError(f"{self.name} knows no branches of kind {unknown[0]!r}; known: {', '.join(KINDS)}")
        require_timestep(self.name, program, self.timestep)
        require_order(self.name, self.extrapolation)

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        joins = residual_joins(program)
        patterns, schedule = self._patterns(joins)
        inputs, name, full = program.inputs, program.name, cost(program).total_macs
        cuts = {branch_register(i): join.branch for i, join in enumerate(joins)}
        registers = {stage: [branch_register(i) for i in numbers] for stage, numbers in patterns.items()}
        stages = cut_stages(program, self.name, cuts, registers)
        notes = tuple(f"{branch_register(i)} is the {join.kind} of {join.module}" for i, join in enumerate(joins))
        plan = Plan(stages, schedule, inputs, self.timestep, name, notes, self.extrapolation)
        stats: dict[str, float] = {"branches": len(joins), "patterns": len(patterns), "macs_refresh": full}
        stats |= {f"macs_{stage}": cost(stages[stage].program).total_macs for stage in patterns}
        return PassResult(True, stats, output=plan)

    def _patterns(self, joins: tuple[ResidualJoin, ...]) -> tuple[dict[str, tuple[int, ...]], Schedule]:
        """Return the distinct patterns by stage, and the schedule."""
        if not self.reuse:
            chosen = tuple(i for i, join in enumerate(joins) if join.kind in self.kinds)
            return {REUSE: chosen}, self.schedule or Uniform(self.interval_steps)
        wanted = [tuple(sorted(set(numbers))) for numbers in self.reuse]
        distinct = [pattern for pattern in dict.fromkeys(wanted) if pattern]
        stage = {pattern: f"{REUSE}_{i}" for i, pattern in enumerate(distinct)} | {(): REFRESH}
        return {stage[p]: p for p in distinct}, Listed(tuple(stage[p] for p in wanted))


def branch_register(number: int) -> str:
    """Return the name of the register that keeps a branch."""
    return f"{BRANCH}{number}"


def register_kinds(plan: Plan) -> dict[str, str]:
    """Return the kind of the branch that each register keeps, ``attention`` or ``mlp``; ``feature`` for any other."""
    branches: dict[str, str] = {}
    if any(name.startswith(BRANCH) for name in plan.registers):
        joins = residual_joins(plan.stages[REFRESH].program)
        branches = {branch_register(i): join.kind for i, join in enumerate(joins)}
    return {name: branches.get(name, "feature") for name in plan.registers}


def require_kinds(rule: str, expected: Sequence[str], program: Program) -> None:
    """Raise `PreconditionError` unless the program's branches are of these kinds, in this order."""
    found = [join.kind for join in residual_joins(program)]
    if len(found) != len(expected):
        raise PreconditionError(
            f"{rule} has a list for {len(expected)} branches, and {program.name} has {len(found)}; make the list for this model"
        )
    if different := [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]:
        i = different[0]
        raise PreconditionError(
            f"{rule} has a list in which branch {i} is of kind {expected[i]}, and in {program.name} it is of kind "
            f"{found[i]}; make the list for this model"
        )
