"""A small trainer: one loop for fine-tuning, distillation and sparse training of a module, over `accelerate`.

Device placement, mixed precision and checkpoints are accelerate's; optimisers and the moving average of weights are
torch's. A run that was interrupted goes on from its last checkpoint and ends with the weights of one that was not.

    train(module, loss, batches, Schedule(steps=1000, learning_rate=1e-4), folder=Path("checkpoints"))
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ..graph.errors import PreconditionError
from .training import DECAYS, OPTIMIZERS, Training

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE = "training.json"

Loss = Callable[[Any, Any], Tensor]
# More gradients by parameter name, given the parameters by name.
Penalty = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        losses: One for each step, the mean over the batches of the step.
        seconds: Of this process; what an earlier one did is not in it.
        resumed: Steps that a checkpoint of an earlier process had done.
    """

    losses: tuple[float, ...]
    seconds: float
    resumed: int = 0


def train(
    module: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    training: Training,
    *,
    penalty: Penalty | None = None,
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trained:
    """Train the parameters of ``module`` that require a gradient, in place. Its mode (train or eval) stays.

    Args:
        module: On any device; it is trained where accelerate decides and comes back.
        loss: ``loss(module, batch)`` returns a scalar; it calls the module like the model.
        batches: Gone through again and again; each pass is an epoch. It must give the same batches for the same state
            of torch's generator, as a list or a `DataLoader` does, or a resumed run differs from an unbroken one.
        training: How.
        penalty: Called when the gradients of a step are there; returns more gradients by parameter name. What it
            remembers is in checkpoints if it has ``state_dict`` and ``load_state_dict``.
        folder: Where checkpoints go; None keeps none. A finished training removes them.
        progress: Called with ``("train", done, steps)``.

    Raises:
        PreconditionError: There is no parameter to train or no batch; a loss is not a finite scalar that depends on the
            module; the checkpoint in the folder is of another training; accelerate is not installed.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise PreconditionError(f"{type(module).__name__} has no parameter that requires a gradient")
    if any(p.is_meta for p in named.values()):
        raise PreconditionError(f"{type(module).__name__} has weights on the meta device; load them first")
    home, began = next(iter(named.values())).device, time.perf_counter()
    with _accelerator(training) as accelerator, _random_states():
        torch.manual_seed(training.seed)
        run = _Run(module, training, accelerator, folder, penalty)
        resumed = run.resume()
        for batch in run.remaining(batches):
            run.step(loss, batch)
            if run.boundary and progress is not None:
                progress("train", len(run.losses), training.steps)
        run.finish()
    module.to(home)
    return Trained(tuple(run.losses), time.perf_counter() - began, resumed)


class _Run:
    """One training: the module, its optimiser and where they stand."""

    def __init__(
        self,
        module: nn.Module,
        training: Training,
        accelerator: Accelerator,
        folder: Path | None,
        penalty: Penalty | None,
    ) -> None:
        self.module, self.training, self.accelerator, self.folder = module, training, accelerator, folder
        self.penalty = penalty
        if hasattr(penalty, "state_dict") and hasattr(penalty, "load_state_dict"):
            accelerator.register_for_checkpointing(penalty)
        parameters = [p for p in module.parameters() if p.requires_grad]
        module.to(accelerator.device)
        optimizer = OPTIMIZERS[training.optimizer](
            parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        # Not prepared: accelerate would step the schedule as often as there are processes.
        self.rates = LambdaLR(optimizer, self._rate)
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        accelerator.register_for_checkpointing(self.rates)
        self.trained = nn.ParameterList(parameters)
        self.averaged = None
        if training.average:
            self.averaged = AveragedModel(self.trained, multi_avg_fn=_averaging(training.average))
            accelerator.register_for_checkpointing(self.averaged)
        self.losses: list[float] = []
        self.batches = 0  # of all epochs
        self.parts: list[float] = []  # losses of the batches of the step that is under way

    @property
    def boundary(self) -> bool:
        """Whether the last batch ended a step."""
        return not self.parts

    def _rate(self, step: int) -> float:
        warmup, steps = self.training.warmup, self.training.steps
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return rise * DECAYS[self.training.decay](max(0, step - warmup) / max(1, steps - warmup))

    def remaining(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches that are still to be trained on, on the device."""
        from accelerate.utils import send_to_device

        skip, epoch, generator = self.batches, 0, torch.get_rng_state()
        while len(self.losses) < self.training.steps:
            # Each epoch is drawn from its own seed, so that a resumed run gets the order that an unbroken one gets.
            torch.manual_seed(self.training.seed * 1_000_003 + epoch)
            found = 0
            for found, batch in enumerate(batches, 1):  # noqa: B007 (read below)
                if skip:
                    skip -= 1
                    if not skip:
                        torch.set_rng_state(generator)
                    continue
                yield send_to_device(batch, self.accelerator.device)
                if len(self.losses) >= self.training.steps:
                    return
            if not found:
                raise PreconditionError("there is no batch to train on; an iterator that was used up gives none")
            epoch += 1

    def step(self, loss: Loss, batch: Any) -> None:
        """Add the gradients of a batch; with the last one of a step, change the weights."""
        with torch.enable_grad(), self.accelerator.autocast():
            value = loss(self.model, batch)
        self._check(value)
        self.accelerator.backward(value / self.training.accumulate)
        self.parts.append(float(value.detach()))
        self.batches += 1
        if len(self.parts) < self.training.accumulate:
            return
        self.accelerator.unscale_gradients(self.optimizer)
        if self.penalty is not None:
            _add_gradients(self.module, self.penalty(dict(self.module.named_parameters(remove_duplicate=False))))
        if self.training.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.training.clip)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update_parameters(self.trained)
        self.losses.append(sum(self.parts) / len(self.parts))
        self.parts.clear()
        if self.folder is not None and len(self.losses) % self.training.save_every == 0:
            self._save(self.folder)

    def finish(self) -> None:
        """Give the module the averaged weights and its own forward back, and remove the checkpoint."""
        if self.averaged is not None:
            with torch.no_grad():
                for parameter, average in zip(self.trained, self.averaged.module.parameters(), strict=True):
                    parameter.copy_(average)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def resume(self) -> int:
        """Go on from the checkpoint if there is one; return the steps that it has done."""
        if self.folder is None or not (self.folder / STATE).is_file():
            return 0
        state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        if state["training"] != asdict(self.training):
            raise PreconditionError(
                f"{self.folder} holds a checkpoint of another training ({_difference(state['training'], self.training)}): "
                "remove it, or train with its options"
            )
        self.accelerator.load_state(str(self.folder))
        self.losses, self.batches = state["losses"], state["batches"]
        return len(self.losses)

    def _save(self, folder: Path) -> None:
        """Write a checkpoint beside the last one, and put it in its place when it is whole."""
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.save_state(str(fresh), safe_serialization=False)
        state = {"training": asdict(self.training), "losses": self.losses, "batches": self.batches}
        (fresh / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)

    def _check(self, value: Any) -> None:
        what = f"the loss of step {len(self.losses) + 1}"
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PreconditionError(f"{what} must be a scalar tensor, got {got}")
        if not bool(torch.isfinite(value)):
            raise PreconditionError(f"{what} is {value.item()}: check the batch, or lower the learning rate")
        if not value.requires_grad:
            raise PreconditionError(f"{what} does not depend on the parameters that are trained; call the module in it")


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return what moves averaged weights towards the current ones, in place."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
        done = int(count)
        weight = 1.0 - min(decay, (1 + done) / (10 + done))
        # As torch's own averages do.
        torch._foreach_lerp_(averaged, current, weight)  # pyright: ignore[reportPrivateImportUsage]

    return update


def _add_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        parameter = module.get_parameter(name)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _difference(before: Mapping[str, Any], now: Training) -> str:
    return ", ".join(f"{k} was {before.get(k)!r} and is {v!r}" for k, v in asdict(now).items() if before.get(k) != v)


@contextmanager
def _random_states() -> Iterator[None]:
    """Leave all generators as they were; loading a checkpoint sets Python's and NumPy's too."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _accelerator(training: Training) -> Iterator[Accelerator]:
    """Yield an accelerator of the wanted precision; one that the caller already runs under is used as it is."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as err:
        raise PreconditionError("training needs accelerate: pip install 'graphwright[hf]'") from err
    ours = not AcceleratorState._shared_state
    try:
        try:
            accelerator = Accelerator(mixed_precision=training.precision)
        except ValueError as err:
            raise PreconditionError(f"precision={training.precision!r} is not to be had here: {err}") from err
        yield accelerator
    finally:
        if ours:
            # The state is global, and the next training may want another precision.
            AcceleratorState._reset_state(reset_partial_state=True)


__all__ = ["Loss", "Penalty", "Trained", "Training", "train"]
