"""What the trainings of the built-in models share: batches, learning rates, averaged weights, the loop, the files."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..frontends.builtin.digits import HELD_OUT_FRACTION, SPLIT_SEED, digits_images
from ..graph.versions import versions_of
from .digits_sampler import SCHEDULE

Record = dict[str, Any]

MAX_BYTES = 3_900_000

# ``predict(model, sample [n, 1, 8, 8], timestep [n], chosen [n], generator) -> noise``; ``chosen`` are the indices of
# the train digits in the batch.
Predict = Callable[[nn.Module, Tensor, Tensor, Tensor, torch.Generator], Tensor]

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Settings:
    """How a denoiser is trained.

    Attributes:
        steps: Optimiser steps.
        batch: Images of a step.
        rate: Peak learning rate; it warms up and then follows a cosine to zero.
        decay: Of the moving average of weights (it starts lower, so that initial weights are soon forgotten).
        seed: Of weights, batches, timesteps and noise.
    """

    steps: int
    batch: int
    rate: float
    decay: float
    seed: int


def fit_denoiser(
    build: Callable[[], _Model], predict: Predict, told: Callable[[nn.Module], str], settings: Settings
) -> tuple[_Model, Record]:
    """Train a noise predictor on the train split and keep the moving average of its weights.

    Args:
        build: Makes the model with initial weights from the global generator.
        predict: Evaluates the model on noisy digits.
        told: Says how good the averaged weights are, printed every 250 steps.
        settings: How long and how fast.

    Returns:
        The averaged model in eval mode, and what to record about its training.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(settings.seed)  # initial weights and dropout draw from the global generator
    generator = torch.Generator().manual_seed(settings.seed)
    images, _ = digits_images()
    model, averaged = build().train(), build().eval()
    averaged.load_state_dict(model.state_dict())
    scheduler = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=1e-4)
    batches, began, smooth = index_batches(len(images), settings.batch, generator), time.perf_counter(), 0.0
    for step in range(settings.steps):
        set_rate(optimizer, settings.rate, step, settings.steps)
        chosen = next(batches)
        clean = images[chosen]
        timestep = _spread(settings.batch, scheduler.config["num_train_timesteps"], generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]  # takes int64 too
        predicted = predict(model, noisy, timestep, chosen, generator)
        loss = nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _average(averaged, model, min(settings.decay, (1.0 + step) / (10.0 + step)))
        smooth = running(smooth, loss.item(), step)
        if (step + 1) % 250 == 0:
            print(f"denoiser {step + 1}/{settings.steps} loss {smooth:.4f} averaged: {told(averaged)}", flush=True)
    return averaged, {
        "seed": settings.seed,
        "steps": settings.steps,
        "batch": settings.batch,
        "learning_rate": settings.rate,
        "average_decay": settings.decay,
        "train_loss": round(smooth, 5),
        "seconds": round(time.perf_counter() - began, 1),
    }


def save(model: nn.Module, folder: Path, config: dict[str, Any] | None, record: Record) -> None:
    """Write ``model.safetensors`` and ``training.json`` into a folder, which is made if missing.

    Args:
        model: Whose state dict is written as it is.
        folder: Of the model.
        config: Content of ``config.json``; None leaves that file alone.
        record: Facts of the training; versions and the split are added.

    Raises:
        ValueError: The weights take more than 3.9 MB, too much to ship.
    """
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if (size := sum(t.numel() * t.element_size() for t in weights.values())) > MAX_BYTES:
        raise ValueError(f"{folder.name} has {size} bytes of weights, more than {MAX_BYTES}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets the owner alone read it
    record = {
        **record,
        "parameters": sum(p.numel() for p in model.parameters()),
        "split": {"seed": SPLIT_SEED, "held_out_fraction": HELD_OUT_FRACTION},
        "versions": {
            "python": platform.python_version(),
            **versions_of(("torch", "diffusers", "scikit-learn", "safetensors")),
        },
    }
    for name, content in (("training.json", record), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {folder}: {size} bytes of weights")


def save_denoiser(model: Any, folder: Path, record: Record) -> None:
    """Write the folder of a diffusers model; diffusers writes both configurations, so that it reads them back."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    save(model, folder, None, record)
    model.save_config(folder)
    DDPMScheduler(**SCHEDULE).save_config(folder)


def index_batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield endless index batches of one size; every index comes once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warm: int = 200) -> None:
    """Set the learning rate of a step: linear up over ``warm`` steps, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / warm)
    for group in optimizer.param_groups:
        group["lr"] = peak * rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def running(average: float, loss: float, step: int) -> float:
    """Return the moving average of the loss over about 100 steps."""
    return loss if step == 0 else average + (loss - average) / min(step + 1, 100)


def _spread(batch: int, levels: int, generator: torch.Generator) -> Tensor:
    """Return one timestep from each of ``batch`` equal ranges: steadier gradients than independent draws."""
    spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (spread * levels).to(torch.int64).clamp(max=levels - 1)


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's, in place."""
    for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1.0 - decay)
