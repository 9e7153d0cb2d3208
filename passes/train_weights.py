"""Train a program's weights: sparse training before a removal, recovery after it, with or without the original as teacher.

    before: y = linear(x, w[10, 45])
    after:  y = linear(x, w'[10, 45])        w' from `steps` steps on the context's training batches

The caller's tensors are not written into. What an interrupted training has done is kept where the context says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from ..graph.depgraph import depgraph
from ..graph.errors import PreconditionError
from ..graph.program import Program, distinct, set_tensor
from .base import Context, Pass, PassResult
from .calibration import handles
from .distillation import DISTANCES, Distilled, feature_nodes, kept_dimensions
from .sparse_training import PENALTIES
from .trainer import Training, train
from .watched import Watched


@dataclass(frozen=True, kw_only=True)
class TrainWeights(Training, Pass):
    """Train all parameters that require a gradient.

    The loss is `Context.training_loss` (or `Context.loss`) on `Context.training`. Dropout and batch norms are as
    captured, mostly as in evaluation; to train a module in train mode, call `graphwright.passes.trainer.train` on what
    `write_back` made.

    Attributes:
        distil: Weight of the distance to the program as it was before all passes, in [0, 1]; the loss has the rest.
        distance: Between outputs: ``mse``, or ``kl`` for classes in the last dimension.
        temperature: That softens the classes for ``kl``.
        features: Modules or nodes whose values are compared with the original's too, by their mean square.
        penalty: ``group-lasso``, ``bn-scale`` or ``growing`` for sparse training; empty for none. Take `weight_decay` 0.
        penalty_strength: 1e-5 to 5e-4 in the papers.
    """

    name: ClassVar[str] = "train-weights"
    only_trains: ClassVar[bool] = True

    distil: float = 0.0
    distance: str = "mse"
    temperature: float = 1.0
    features: tuple[str, ...] = ()
    penalty: str = ""
    penalty_strength: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distil <= 1:
            raise ValueError(f"distil must be in [0, 1], got {self.distil!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {self.distance!r}")
        if self.penalty and self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, got {self.penalty!r}")
        if self.features and not self.distil:
            raise ValueError("features are compared with a teacher: give distil as well")

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        loss: Any = ctx.training_loss or ctx.loss
        if loss is None or ctx.training is None:
            raise PreconditionError(
                "training needs a loss and batches: give Context(loss=..., training=[...]), or in a recipe `training`"
            )
        own, names = _own_parameters(program)
        nodes = feature_nodes(program, self.features)
        student = Watched(own, nodes)
        if self.distil:
            if ctx.original is None:
                raise PreconditionError("distil needs the program before all passes: run this in a Pipeline")
            kept = kept_dimensions(ctx.original, ctx.removal, nodes) if nodes else []
            loss = Distilled(
                loss, Watched(handles(ctx.original)[0], nodes), self.distil, self.distance, self.temperature, kept
            )
        penalty = None
        if self.penalty:
            penalty = PENALTIES[self.penalty](depgraph(own), self.penalty_strength)
        training = Training(**{f.name: getattr(self, f.name) for f in fields(Training)})
        done = train(
            student,
            loss if self.distil else _forgetting(loss),
            ctx.training,
            training,
            penalty=penalty,
            folder=ctx.checkpoints,
            progress=ctx.progress,
        )
        for name, parameter in names.items():
            set_tensor(program.graph_module, name, parameter)
        tenth = max(1, len(done.losses) // 10)
        stats = {
            "steps": float(len(done.losses)),
            "steps_resumed": float(done.resumed),
            "loss_first_tenth": sum(done.losses[:tenth]) / tenth,
            "loss_last_tenth": sum(done.losses[-tenth:]) / tenth,
        }
        return PassResult(True, stats)


def _forgetting(loss: Any) -> Any:
    """Return the loss of a `Watched` module that forgets its calls."""

    def forgetful(student: Watched, batch: Any) -> Any:
        value = loss(student, batch)
        student.calls.clear()
        return value

    return forgetful


def _own_parameters(program: Program) -> tuple[Program, dict[str, nn.Parameter]]:
    """Return a copy of ``program`` whose parameters can be trained without writing into the caller's, and these by name."""
    work, named = handles(program)
    for parameter in distinct(named.values()):
        parameter.data = parameter.data.clone()
    for name, parameter in program.parameters().items():
        if name in named:
            named[name].requires_grad_(parameter.requires_grad)
    return work, named
