"""Cache of residual branches that are chosen by training (Learning-to-Cache, arXiv 2406.01733).

before: h = x + gate * f(x), at every evaluation
after:  the plan of `InsertLayerCache`, with the branches that a router, trained on the sampler's own runs, lets go
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..graph.errors import PreconditionError
from ..graph.program import Program
from ..graph.schedules import alternating
from .base import Context, Pass, PassResult
from .cache_cuts import require_timestep
from .insert_layer_cache import KINDS
from .layer_router import LayerRouter
from .train_layer_router import train_layer_router


@dataclass(frozen=True, kw_only=True)
class LearnLayerCache(Pass):
    """Train a router on sampling runs of the context, and take the branches that it lets go from the last full evaluation.

    Attributes:
        evaluations: Of a sampling run; the plan is for runs of this length.
        per_step: Evaluations that the solver makes a step, 1 or 2; every second evaluation is a cheap one.
        rounds: Sampling runs to train on.
        lam: Price of a computed branch, in units of the mean squared difference; null takes ``lam_of_all_reused``.
        lam_of_all_reused: The price as a share of that difference when every branch is reused.
        lr: Of AdamW.
        threshold: A branch is computed where its gate is above this.
        seed: Of the first gates and of the sampling runs.
        timestep: Name of the input that holds the time.
        objective: ``result`` compares the model's results at each cheap evaluation, ``picture`` what the whole run draws.
    """

    name: ClassVar[str] = "learn-layer-cache"

    evaluations: int
    per_step: int = 1
    rounds: int = 200
    lam: float | None = None
    lam_of_all_reused: float = 0.01
    lr: float = 0.1
    threshold: float = 0.1
    seed: int = 0
    timestep: str = "timestep"
    objective: str = "result"

    def __post_init__(self) -> None:
        if self.evaluations < 2 or self.rounds < 1:
            raise ValueError(
                f"evaluations must be 2 or more and rounds 1 or more, got {self.evaluations}, {self.rounds}"
            )

    def requires(self, program: Program) -> None:
        require_timestep(self.name, program, self.timestep)

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        router = self.train(program, ctx)
        step = router.layer_cache(timestep=self.timestep)
        step.requires(program)
        result = step.rewrite(program, ctx)
        removed = router.removed()
        gates = router.logits.numel()
        stats = {
            "gates": gates,
            "gates_let_go": sum(removed.values()),
            **{f"{kind}_let_go": removed.get(kind, 0) for kind in KINDS},
            **result.stats,
        }
        return PassResult(result.modified, stats, result.skipped, output=result.output)

    def train(self, program: Program, ctx: Context) -> LayerRouter:
        """Return the router that `rewrite` uses.

        Raises:
            PreconditionError: The context has no sampling loop, or see `train_layer_router`.
        """
        if ctx.sample is None:
            raise PreconditionError(
                f"{self.name} learns on sampling runs: give Context(sample=...), or `sampling` in a recipe"
            )
        return train_layer_router(
            program,
            ctx.sample,
            evaluations=self.evaluations,
            cheap=alternating(self.evaluations, self.per_step),
            lam=self.lam,
            lam_of_all_reused=self.lam_of_all_reused,
            lr=self.lr,
            rounds=self.rounds,
            seed=self.seed,
            threshold=self.threshold,
            objective=self.objective,
            progress=ctx.report,
        )
