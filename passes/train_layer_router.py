"""Train a layer router on the sampler's own runs: no data, and the model's weights stay as they are.

    router = train_layer_router(program, sample, evaluations=20, rounds=200)
    router.save("router.safetensors")

``sample(denoise, generator)`` is the caller's sampling loop (see `sampling_runs`); one call of it is a round. At cheap
evaluation ``m`` the loss is

    weight_m * mean((gated(x; sigmoid(w_m)) - model(x)) ** 2) + lam * sum(sigmoid(w_m))

and one step of AdamW changes the row ``w_m`` alone. ``weight_m`` is 1 where none is given. ``lam`` is in units of the mean
squared difference of the model's results, over batch and all elements; what it means depends on how large that is when
every branch is reused.

Papers: Learning-to-Cache (arXiv 2406.01733) for the gates and the loss; HarmoniCa (arXiv 2410.01723) for training without
images, and for following the cached run so that the error of earlier evaluations is seen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..graph.errors import ArtifactError, PreconditionError
from ..graph.program import Program
from ..graph.schedules import alternating
from .gated_program import GATE, GatedProgram, gated_program
from .layer_router import LayerRouter, read_tensors, write_tensors
from .sampling_runs import Evaluation, Sample, mean_squared, require_cheap, sampling_run

Progress = Callable[[str, int, int], None]

# Whose result the sampling loop goes on with after a cheap evaluation.
FOLLOW = ("teacher", "student", "thresholded")
# Default of `lam`, as a share of the mean squared difference when every branch is reused.
LAM_SHARE = 0.01
CHECKPOINT = "graphwright layer router training"


@dataclass(frozen=True)
class _Settings:
    """What a training is repeated with; ``lam`` as it was asked for."""

    cheap: tuple[int, ...]
    lam: float | None
    lr: float
    weight_decay: float
    seed: int
    clamp: tuple[float, float] | None
    follow: str
    threshold: float
    evaluations: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.follow not in FOLLOW:
            raise PreconditionError(f"follow must be one of {', '.join(FOLLOW)}, got {self.follow!r}")
        if not self.lr > 0 or (self.lam is not None and not self.lam >= 0):
            raise PreconditionError(f"lr must be above 0 and lam 0 or more, got lr {self.lr} and lam {self.lam}")
        if len(self.weights) != len(self.cheap) or not all(0 <= weight < math.inf for weight in self.weights):
            raise PreconditionError(
                f"weights must be {len(self.cheap)} numbers of 0 or more, one for each cheap evaluation, got {self.weights}"
            )


def train_layer_router(
    program: Program,
    sample: Sample,
    *,
    evaluations: int,
    cheap: Sequence[int] | None = None,
    lam: float | None = None,
    lr: float = 0.1,
    weight_decay: float = 0.0,
    rounds: int = 200,
    seed: int = 0,
    clamp: tuple[float, float] | None = (-5.0, 5.0),
    follow: str = "teacher",
    threshold: float = 0.1,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_rounds: int = 10,
    resume: bool = False,
) -> LayerRouter:
    """Learn which branches each cheap evaluation of a sampling run can take from the full one before it.

    Before the rounds, one run measures the loss with every branch reused. The same seed gives the same router, as far
    as ``sample`` draws from the generator alone.

    Args:
        program: Captured from the denoiser, with weights. Neither it nor the model is changed, and no parameter gets a
            gradient.
        sample: ``sample(denoise, generator)`` makes one sampling run from noise, or from latents of its own, and calls
            ``denoise`` as the model is called. What it returns is used by `picture_weights` only. The generator is on the CPU.
        evaluations: Of a run: its steps, or twice as many for a solver that evaluates twice a step.
        cheap: Numbers of the evaluations that may reuse; by default every second one, ``alternating(evaluations)``.
        lam: Price of an open gate. None takes 0.01 of the mean (weighted) squared difference when every branch is reused.
        lr: Of AdamW, the most that a logit moves in a round. The paper's text says 0.01 and its published routers 0.001,
            with about two thousand steps for each evaluation; give as many ``rounds`` with these.
        weight_decay: Of AdamW.
        rounds: Sampling runs; each is one step for every cheap evaluation.
        seed: Of the first logits, which are normal, and of the generator.
        clamp: Bounds of the logits; None for none.
        follow: The run goes on with the full model's result (``teacher``), with that of the gates as they are
            (``student``), or as they will be (``thresholded``).
        threshold: Of the router that is returned.
        weights: Of the differences at each cheap evaluation, such as `picture_weights`; None for 1.
        progress: Called with ``(what, rounds done, rounds)``.
        checkpoint: A file that holds the state of the training, replaced every ``checkpoint_rounds`` rounds.
        checkpoint_rounds: See there.
        resume: Go on from the checkpoint, if there is one, to exactly what one training without a break gives.

    Returns:
        The router. Its ``settings`` say what it was trained with, and of the last round and of the measured run the
        mean squared differences.

    Raises:
        PreconditionError: An option is out of range, ``sample`` makes another number of evaluations, the loss is not a
            number, or the checkpoint is of a training with other settings.
        ArtifactError: The checkpoint is damaged.
    """
    places = require_cheap(evaluations, alternating(evaluations) if cheap is None else cheap)
    weighted = (1.0,) * len(places) if weights is None else tuple(float(weight) for weight in weights)
    settings = _Settings(places, lam, lr, weight_decay, seed, clamp, follow, threshold, evaluations, weighted)
    training = _Training(gated_program(program), settings, program.name)
    resumed = resume and checkpoint is not None and Path(checkpoint).is_file()
    if resumed and checkpoint is not None:
        training.restore(checkpoint)
    else:
        training.measure(sample)
    if training.done > rounds:
        raise PreconditionError(f"the checkpoint has {training.done} rounds behind it, and {rounds} are wanted")
    while training.done < rounds:
        training.round(sample)
        if progress is not None:
            progress(training.state(), training.done, rounds)
        if checkpoint is not None and (training.done % checkpoint_rounds == 0 or training.done == rounds):
            training.save(checkpoint)
    return training.router()


class _Training:
    """Logits, optimiser and generator between two rounds, and what a round does with them."""

    def __init__(self, programs: GatedProgram, settings: _Settings, name: str) -> None:
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
        self.errors, self.all_reused = torch.zeros(shape[0]), torch.zeros(shape[0])
        self.done = 0

    @property
    def lam(self) -> float:
        """Price of an open gate."""
        if self.settings.lam is not None:
            return self.settings.lam
        return LAM_SHARE * self.weighted_all_reused

    @property
    def scale(self) -> float:
        """Factor of the loss, so that the optimiser's epsilon means the same for results of any magnitude."""
        return 1 / self.weighted_all_reused if self.weighted_all_reused else 1.0

    @property
    def weighted_all_reused(self) -> float:
        """The loss with every branch reused."""
        return float((self.all_reused * torch.tensor(self.settings.weights)).mean())

    def run(self, sample: Sample, at_cheap: Callable[[Evaluation], Any]) -> None:
        settings = self.settings
        sampling_run(self.programs, sample, self.generator, settings.evaluations, settings.cheap, at_cheap)

    def measure(self, sample: Sample) -> None:
        """Let one run of the model say what reusing every branch costs."""

        def at_cheap(at: Evaluation) -> Any:
            teacher = self.programs.plain(*at.args, **at.kwargs)
            self.all_reused[at.row] = self._error(at, self._gated(at, torch.zeros_like(self.rows[at.row])), teacher)
            return teacher

        self.run(sample, at_cheap)

    def round(self, sample: Sample) -> None:
        """Make one run, with a step at each cheap evaluation."""
        self.run(sample, self._step)
        self.done += 1

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
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.clamp is not None:
            row.data.clamp_(*settings.clamp)
        return followed

    def _gated(self, at: Evaluation, gates: Tensor) -> Any:
        return self.programs.gated(*at.args, **at.kwargs, **at.kept, **{GATE: gates})

    def _error(self, at: Evaluation, student: Any, teacher: Any) -> Tensor:
        error = mean_squared(student, teacher)
        if not math.isfinite(error.item()):
            raise PreconditionError(
                f"the mean squared difference is {error.item()} at evaluation {self.settings.cheap[at.row]} of round "
                f"{self.done}; check that the model gives finite values along the sampler's run"
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
