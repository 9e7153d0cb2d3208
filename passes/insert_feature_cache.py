"""Feature cache of a U-Net at a skip connection (DeepCache, arXiv 2312.00858).

before: y = decoder(cat(deep(x), skip(x)))
after:  refresh: F = deep(x); y = decoder(cat(F, skip(x))); return y, F
        reuse:   y = decoder(cat(F, skip(x))), with the F of an earlier evaluation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..graph.cost import cost
from ..graph.errors import PreconditionError
from ..graph.joins import SkipJoin, skip_joins
from ..graph.plan import Plan
from ..graph.program import Program
from ..graph.schedules import REUSE, Listed, Uniform
from .base import Context, Pass, PassResult
from .cache_cuts import cut_stages, live_macs, require_order, require_timestep

REGISTER = "cached_feature"


@dataclass(frozen=True)
class InsertFeatureCache(Pass):
    """Keep the decoder's input at one skip connection for several evaluations.

    Attributes:
        interval_steps: A full evaluation every so many steps; 1 caches nothing.
        branch: Number of the skip connection, 0 is the shallowest. A small number is fast and less accurate.
        schedule: Takes the place of ``interval_steps`` where it is given.
        reuse_ratio: Takes the place of ``branch`` where it is given: the deepest branch, which is the most accurate, whose
            reuse costs at most this fraction of the multiply-accumulates of a full evaluation.
        timestep: Name of the input that holds the time.
        extrapolation: Reuse the polynomial of this order through the last kept values, not the last value (TaylorSeer, arXiv
            2503.06923). It takes as many times the memory, and one more.
    """

    name: ClassVar[str] = "insert-feature-cache"

    interval_steps: int = 3
    branch: int = 0
    schedule: Uniform | Listed | None = None
    reuse_ratio: float | None = None
    timestep: str = "timestep"
    extrapolation: int = 0

    def requires(self, program: Program) -> None:
        joins = skip_joins(program)
        if not joins:
            raise PreconditionError(
                f"{self.name} needs a network with skip connections that are concatenated, and {program.name} has none; "
                "for a transformer use insert-layer-cache"
            )
        if not 0 <= self.branch < len(joins):
            raise PreconditionError(
                f"{self.name} has no branch {self.branch}: {program.name} has {len(joins)} skip connections, numbered "
                f"from 0 (the shallowest) to {len(joins) - 1}"
            )
        require_timestep(self.name, program, self.timestep)
        require_order(self.name, self.extrapolation)
        self._join(program, joins)

    def _join(self, program: Program, joins: Sequence[SkipJoin]) -> SkipJoin:
        if self.reuse_ratio is None:
            return joins[self.branch]
        full = cost(program).total_macs
        ratios = [live_macs(program, {join.cut}) / full for join in joins]
        fitting = [i for i, ratio in enumerate(ratios) if ratio <= self.reuse_ratio]
        if not fitting:
            raise PreconditionError(
                f"{self.name}: no branch of {program.name} costs at most {self.reuse_ratio:.1%} of a full evaluation; the "
                f"cheapest, {ratios.index(min(ratios))}, costs {min(ratios):.1%}"
            )
        return joins[fitting[-1]]

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        join = self._join(program, skip_joins(program))
        inputs, name, full = program.inputs, program.name, cost(program).total_macs
        stages = cut_stages(program, self.name, {REGISTER: join.cut}, {REUSE: {REGISTER}})
        schedule = self.schedule or Uniform(self.interval_steps)
        plan = Plan(stages, schedule, inputs, self.timestep, name, (_note(join),), self.extrapolation)
        reuse = stages[REUSE].program
        stats = {
            "branch": join.branch,
            "macs_refresh": full,
            "macs_reuse": cost(reuse).total_macs,
            "nodes_refresh": sum(1 for _ in program.nodes),
            "nodes_reuse": sum(1 for _ in reuse.nodes),
            "register_bytes": join.cut.meta["val"].element_size() * _elements(plan),
        }
        return PassResult(True, stats, output=plan)


def _note(join: SkipJoin) -> str:
    note = f"the feature that enters {join.module or 'the network'} at {join.node.name} is kept"
    if join.cut is join.main:
        return note
    return f"{note}, before it at {join.cut.name}: from there on it takes more than one way to the results"


def _elements(plan: Plan) -> int:
    stage = plan.stages[REUSE].program
    return next(v.numel() for s, v in zip(stage.inputs, stage.example, strict=True) if s.name == REGISTER)
