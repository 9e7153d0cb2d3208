"""Our caches at several settings, and the plain alternative to any cache: fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from ...graph.joins import residual_joins, skip_joins
from ...graph.plan import Plan
from ...graph.schedules import Schedule, Uniform, centred, warmed_up
from ...passes.base import Pass, Pipeline
from ...passes.insert_feature_cache import InsertFeatureCache
from ...passes.insert_layer_cache import KINDS, InsertLayerCache
from ...passes.layer_router import LayerRouter
from ...passes.train_layer_router import train_layer_router
from ..digits_labels import sampling
from .cache_bed import GUIDANCE, Bed, Model

INTERVALS = (2, 3, 5)
# Of extrapolation, as TaylorSeer's default.
ORDER = 1
# Of the training of routers: runs of a few digits, the most that a logit moves, and where gates are cut.
ROUNDS, DIGITS, RATE, THRESHOLDS = 60, 8, 0.1, (0.1, 0.9)
# Shares of the uncached run's steps.
FEWER = (0.8, 0.66, 0.5, 0.4, 0.34, 0.26, 0.2, 0.16, 0.1)


@dataclass(frozen=True)
class Contender:
    """A way to draw that costs less.

    Attributes:
        who: ``graphwright``, ``diffusers`` or ``fewer steps``.
        method: Of which papers or libraries speak.
        setting: Of the method.
        make: Returns the model for one run.
        steps: Of the sampler; None for those of the uncached run.
    """

    who: str
    method: str
    setting: str
    make: Callable[[], Model]
    steps: int | None = None

    @property
    def key(self) -> str:
        """Name it among all."""
        return f"{self.method}, {self.setting}"


def fewer_steps(bed: Bed) -> list[Contender]:
    """Return the uncached denoiser with fewer steps."""
    chosen = sorted({max(2, round(share * bed.steps)) for share in FEWER} - {bed.steps})
    return [Contender("fewer steps", "DDIM", f"{steps} steps", lambda: bed.module, steps) for steps in chosen]


def ours(bed: Bed) -> list[Contender]:
    """Return every cache of ours that applies to the denoiser."""
    return [*_feature_caches(bed), *_layer_caches(bed), *_learned(bed)]


def _feature_caches(bed: Bed) -> Iterator[Contender]:
    """DeepCache: a full evaluation every N, cut at each branch; and denser in the middle of the run."""
    for branch in range(len(skip_joins(bed.program))):
        plan = _lazy(bed, InsertFeatureCache(branch=branch, timestep=bed.names[1]))
        for interval in INTERVALS:
            yield _contender("DeepCache", f"branch {branch}, N={interval}", plan, Uniform(interval))
        schedule = centred(bed.steps, 5, bed.steps // 2, 1.4)
        yield _contender("DeepCache", f"branch {branch}, N=5, dense in the middle", plan, schedule)
        yield from _extrapolated(bed, "DeepCache", f"branch {branch}", plan)


def _layer_caches(bed: Bed) -> Iterator[Contender]:
    """FORA: all attention and feed-forward branches, or the attention alone, every N."""
    if not residual_joins(bed.program):
        return
    for kinds, label in ((KINDS, "all branches"), (("attention",), "attention")):
        plan = _lazy(bed, InsertLayerCache(kinds=kinds, timestep=bed.names[1]))
        for interval in INTERVALS:
            yield _contender("InsertLayerCache", f"{label}, N={interval}", plan, Uniform(interval))
        if kinds == KINDS:
            yield from _extrapolated(bed, "InsertLayerCache", label, plan)


def _learned(bed: Bed) -> Iterator[Contender]:
    """Learning-to-Cache, on transformers: routers of which one evaluation in N is full, at two thresholds."""
    if not bed.labelled:
        return
    for interval in INTERVALS[:2]:
        router = cache(lambda interval=interval: _router(bed, interval))
        for threshold in THRESHOLDS:
            yield Contender(
                "graphwright",
                "LearnLayerCache",
                f"one in {interval} full, threshold {threshold}",
                lambda router=router, threshold=threshold: Pipeline([router().layer_cache(threshold, bed.names[1])])(
                    bed.program
                ).plan.module(),
            )


def _router(bed: Bed, interval: int) -> LayerRouter:
    cheap = [i for i in range(bed.steps) if i % interval]
    sample = sampling(DIGITS, bed.steps, GUIDANCE)
    return train_layer_router(bed.program, sample, evaluations=bed.steps, cheap=cheap, lr=RATE, rounds=ROUNDS)


def _extrapolated(bed: Bed, method: str, setting: str, plan: Callable[[], Plan]) -> Iterator[Contender]:
    for interval in INTERVALS:
        schedule = warmed_up(bed.steps, interval)
        yield Contender(
            "graphwright",
            f"{method} extrapolated",
            f"{setting}, N={interval}",
            lambda schedule=schedule: replace(plan(), schedule=schedule, extrapolation=ORDER).module(),
        )


def _lazy(bed: Bed, step: Pass) -> Callable[[], Plan]:
    """Return what makes the plan at the first call."""
    made: list[Plan] = []

    def plan() -> Plan:
        if not made:
            made.append(Pipeline([step])(bed.program).plan)
        return made[0]

    return plan


def _contender(method: str, setting: str, plan: Callable[[], Plan], schedule: Schedule) -> Contender:
    return Contender("graphwright", method, setting, lambda: replace(plan(), schedule=schedule).module())
