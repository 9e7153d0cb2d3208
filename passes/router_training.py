"""What a training of a layer router is between two rounds, what a round does with it, and its checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..graph.errors import ArtifactError, PreconditionError
from .gated_program import GATE, GatedProgram
from .layer_router import LayerRouter, read_tensors, write_tensors
from .sampling_runs import Evaluation, Sample, mean_squared, require_picture, sampling_run

# Whose result the sampling loop goes on with after a cheap evaluation.
FOLLOW = ("teacher", "student", "thresholded")
# What is compared: results of the model at each cheap evaluation, or what the whole run draws.
OBJECTIVES = ("result", "picture")
CHECKPOINT = "graphwright layer router training"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training is repeated with; ``lam`` and ``lam_of_all_reused`` as they were asked for."""

    cheap: tuple[int, ...]
    lam: float | None
    lam_of_all_reused: float
    lr: float
    weight_decay: float
    seed: int
    clamp: tuple[float, float] | None
    follow: str
    threshold: float
    evaluations: int
    weights: tuple[float, ...]
    objective: str

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise PreconditionError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.objective == "picture" and (self.follow != FOLLOW[0] or set(self.weights) != {1.0}):
            raise PreconditionError(
                f"the objective 'picture' follows the gates and has one loss for all evaluations, got follow {self.follow!r} "
                f"and weights {self.weights}; leave both out, or take the objective 'result'"
            )
        if self.follow not in FOLLOW:
            raise PreconditionError(f"follow must be one of {', '.join(FOLLOW)}, got {self.follow!r}")
        if (
            not self.lr > 0
            or (self.lam is not None and not self.lam >= 0)
            or not 0 <= self.lam_of_all_reused < math.inf
        ):
            raise PreconditionError(
                f"lr must be above 0, lam and lam_of_all_reused 0 or more, got lr {self.lr}, lam {self.lam} and "
                f"lam_of_all_reused {self.lam_of_all_reused}"
            )
        if len(self.weights) != len(self.cheap) or not all(0 <= weight < math.inf for weight in self.weights):
            raise PreconditionError(
                f"weights must be {len(self.cheap)} numbers of 0 or more, one for each cheap evaluation, got {self.weights}"
            )


class Training:
    """Logits, optimiser and generator between two rounds, and what a round does with them."""

    def __init__(self, programs: GatedProgram, settings: Settings, name: str) -> None:
        self.programs, self.settings, self.name = programs, settings, name
        device = next(iter(programs.plain.tensors().values())).device
        if device.type == "meta":
            raise PreconditionError(f"{name} has no weights, only their shapes: capture the model with its weights")
        self.generator = torch.Generator().manual_seed(settings.seed)
        shape = len(settings.cheap), len(programs.kinds)
        first = torch.randn(shape, generator=self.generator).to(programs.open_gates)
        self.rows = [row.clone().requires_grad_() for row in first]
        self.optimizer = torch.optim.AdamW(
            self.rows, lr=settings.lr, weight_decay=settings.weight_decay, foreach=False, fused=False
        )
        # Mean squared differences: of the last round, and with every branch reused.
        losses = shape[0] if settings.objective == "result" else 1
        self.errors, self.all_reused = torch.zeros(losses), torch.zeros(losses)
        self.done = 0

    @property
    def lam(self) -> float:
        """Price of an open gate."""
        if self.settings.lam is not None:
            return self.settings.lam
        return self.settings.lam_of_all_reused * self.weighted_all_reused

    @property
    def scale(self) -> float:
        """Factor of the loss, so that the optimiser's epsilon means the same for results of any magnitude."""
        return 1 / self.weighted_all_reused if self.weighted_all_reused else 1.0

    @property
    def weighted_all_reused(self) -> float:
        """The loss with every branch reused."""
        return float((self.all_reused * torch.tensor(self.settings.weights)).mean())

    def run(self, sample: Sample, at_cheap: Callable[[Evaluation], Any], differentiable: bool = False) -> Any:
        evaluations, cheap = self.settings.evaluations, self.settings.cheap
        return sampling_run(self.programs, sample, self.generator, evaluations, cheap, at_cheap, differentiable)

    def measure(self, sample: Sample) -> None:
        """Let one run of the model say what reusing every branch costs."""
        if self.settings.objective == "picture":
            self.all_reused[0] = self._picture_error(sample, [torch.zeros_like(row) for row in self.rows])
            return

        def at_cheap(at: Evaluation) -> Any:
            teacher = self.programs.plain(*at.args, **at.kwargs)
            self.all_reused[at.row] = self._error(at, self._gated(at, torch.zeros_like(self.rows[at.row])), teacher)
            return teacher

        self.run(sample, at_cheap)

    def round(self, sample: Sample) -> None:
        """Make one run, with a step at each cheap evaluation, or at its end."""
        if self.settings.objective == "picture":
            self._picture_step(sample)
        else:
            self.run(sample, self._step)
        self.done += 1

    def _picture_step(self, sample: Sample) -> None:
        with torch.enable_grad():
            gates = [row.sigmoid() for row in self.rows]
            error = self._picture_error(sample, gates)
            if not error.requires_grad:
                raise PreconditionError(
                    "what sample returned has no gradient, and the objective 'picture' goes back through the whole run: let "
                    "the loop run without torch.no_grad(), inference_mode and detach(), or take the objective 'result'"
                )
            loss = error + self.lam * torch.stack(gates).sum()
            gradients = torch.autograd.grad(loss * self.scale, self.rows)
        for row, gradient in zip(self.rows, gradients, strict=True):
            row.grad = gradient
        self.errors[0] = error.detach()
        self._update()

    def _picture_error(self, sample: Sample, gates: Sequence[Tensor]) -> Tensor:
        """Draw from one noise without a cache and with these gates, and compare."""
        state = self.generator.get_state()
        with torch.no_grad():
            plain = require_picture(self.run(sample, lambda at: self.programs.plain(*at.args, **at.kwargs)))
        self.generator.set_state(state)
        differentiable = any(gate.requires_grad for gate in gates)
        drawn = self.run(sample, lambda at: self._gated(at, gates[at.row]), differentiable)
        return self._finite(mean_squared(drawn, plain), "in the picture")

    def _step(self, at: Evaluation) -> Any:
        row, settings = self.rows[at.row], self.settings
        teacher = self.programs.plain(*at.args, **at.kwargs)
        with torch.enable_grad():
            gates = row.sigmoid()
            student = self._gated(at, gates)
            error = self._error(at, student, teacher)
            loss = settings.weights[at.row] * error + self.lam * gates.sum()
            row.grad = torch.autograd.grad(loss * self.scale, row)[0]
        self.errors[at.row] = error.detach()
        followed = teacher
        if settings.follow == "student":
            followed = pytree.tree_map_only(Tensor, Tensor.detach, student)
        elif settings.follow == "thresholded":
            followed = self._gated(at, (gates.detach() > settings.threshold).to(gates.dtype))
        self._update()
        return followed

    def _update(self) -> None:
        """Step the rows that have a gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.settings.clamp is not None:
            for row in self.rows:
                row.data.clamp_(*self.settings.clamp)

    def _gated(self, at: Evaluation, gates: Tensor) -> Any:
        return self.programs.gated(*at.args, **at.kwargs, **at.kept, **{GATE: gates})

    def _error(self, at: Evaluation, student: Any, teacher: Any) -> Tensor:
        return self._finite(mean_squared(student, teacher), f"at evaluation {self.settings.cheap[at.row]}")

    def _finite(self, error: Tensor, where: str) -> Tensor:
        if not math.isfinite(error.item()):
            raise PreconditionError(
                f"the mean squared difference is {error.item()} {where} of round {self.done}; check that the model gives "
                "finite values along the sampler's run"
            )
        return error

    def state(self) -> str:
        """Say how far the training is."""
        gates = torch.stack(self.rows).detach().sigmoid()
        share = float(self.errors.mean()) / max(float(self.all_reused.mean()), 1e-38)
        return f"layer router: error {share:.2%} of that of reusing all, {float(gates.sum()):.1f} of {gates.numel()} gates open"

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write all that the next round depends on."""
        states = [self.optimizer.state[row] for row in self.rows]  # empty for a row that no step was made for
        tensors = {
            f"adamw.{key}": torch.stack(
                [s.get(key, torch.zeros_like(r)) for s, r in zip(states, self.rows, strict=True)]
            )
            for key in ("exp_avg", "exp_avg_sq")
        }
        tensors["adamw.step"] = torch.stack([s.get("step", torch.zeros(())) for s in states])
        tensors |= {"logits": torch.stack(self.rows), "errors": self.errors, "all_reused": self.all_reused}
        tensors["generator"] = self.generator.get_state()
        about = {"settings": asdict(self.settings), "model": self.name, "kinds": self.programs.kinds, "done": self.done}
        write_tensors(file, CHECKPOINT, about, tensors)

    def restore(self, file: str | os.PathLike[str]) -> None:
        """Go back to what `save` wrote."""
        about, tensors = read_tensors(file, CHECKPOINT)
        mine = {**asdict(self.settings), "model": self.name, "kinds": self.programs.kinds}
        theirs = {**about["settings"], "model": about["model"], "kinds": about["kinds"]}
        for name, value in mine.items():
            plain = list(value) if isinstance(value, tuple) else value
            if theirs.get(name) != plain:
                raise PreconditionError(
                    f"the checkpoint {file} is of a training with {name} {theirs.get(name)}, and this one has {plain}; "
                    "repeat its settings, or take another file"
                )
        shape = [len(self.rows), len(self.programs.kinds)]
        if list(tensors["logits"].shape) != shape:
            raise ArtifactError(f"{file} is damaged: its logits do not have the shape {shape}")
        self.generator.set_state(tensors["generator"])
        self.errors, self.all_reused, self.done = tensors["errors"], tensors["all_reused"], about["done"]
        for i, row in enumerate(self.rows):
            row.data.copy_(tensors["logits"][i])
            moments = {key: tensors[f"adamw.{key}"][i].to(row) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[row] = {"step": tensors["adamw.step"][i].clone(), **moments}

    def router(self) -> LayerRouter:
        """Return what was learned."""
        settings = self.settings
        all_reused = self.weighted_all_reused
        about = {
            **asdict(settings),
            "lam": self.lam,
            "lam_of_all_reused": self.lam / all_reused if all_reused else None,
            "rounds": self.done,
            "model": self.name,
            "mse": self.errors.tolist(),
            "mse_all_reused": self.all_reused.tolist(),
        }
        logits = torch.stack(self.rows).detach().cpu()
        return LayerRouter(settings.evaluations, settings.cheap, self.programs.kinds, logits, settings.threshold, about)
