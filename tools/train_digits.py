"""Train the built-in digit models and write their folders.

    python -m graphwright.tools.train_digits                      # both, about 20 minutes on one core
    python -m graphwright.tools.train_digits --part classifier    # seconds

Runs on one CPU thread with seeded generators, so that the same versions of the same libraries on the same
kind of processor write the same weights. ``training.json`` in each folder records the settings and the
measured quality. The classifier comes first: it judges the denoiser. Needs ``graphwright[hf,digits]``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..frontends.builtin.digits import (
    FOLDER,
    HELD_OUT_FRACTION,
    SPLIT_SEED,
    DigitClassifier,
    digits_images,
    digits_labels,
)
from ..graph.versions import versions_of
from .digits import SCHEDULE, denoiser, denoising_loss, digits_features, sample_digits
from .frechet import frechet_distance

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

Record = dict[str, Any]

MAX_BYTES = 3_900_000

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "dropout": 0.1,
}


def train_classifier(steps: int, batch: int, rate: float, seed: int) -> tuple[DigitClassifier, Record]:
    """Train the classifier on the train split, with pixel shifts and noise.

    Args:
        steps: Optimiser steps.
        batch: Images of a step.
        rate: Peak learning rate; it warms up and then follows a cosine to zero.
        seed: Of weights, batches and augmentation.

    Returns:
        The classifier in eval mode, and what to record about its training.
    """
    torch.manual_seed(seed)  # initial weights and dropout draw from the global generator
    generator = torch.Generator().manual_seed(seed)
    images, held_out = digits_images()
    labels, held_out_labels = digits_labels()
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    batches, began, running = _batches(len(images), batch, generator), time.perf_counter(), 0.0
    for step in range(steps):
        _set_rate(optimizer, rate, step, steps)
        chosen = next(batches)
        inputs = _shifted(images[chosen], generator)
        inputs = inputs + 0.1 * torch.randn(inputs.shape, generator=generator)
        loss = nn.functional.cross_entropy(model(inputs), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running = _running(running, loss.item(), step)
        if (step + 1) % 250 == 0:
            print(f"classifier {step + 1}/{steps} loss {running:.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        accuracy = (model(held_out).argmax(1) == held_out_labels).double().mean().item()
    return model, {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning_rate": rate,
        "train_loss": round(running, 5),
        "held_out_accuracy": round(accuracy, 5),
        "seconds": round(time.perf_counter() - began, 1),
    }


def train_denoiser(steps: int, batch: int, rate: float, decay: float, seed: int) -> tuple[UNet2DModel, Record]:
    """Train the noise predictor on the train split and keep the moving average of its weights.

    ``steps``, ``batch`` and ``rate`` are those of `train_classifier`.

    Args:
        decay: Of the moving average of weights (it starts lower, so that initial weights are soon forgotten).
        seed: Of weights, batches, timesteps and noise.

    Returns:
        The averaged model in eval mode, and what to record about its training.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(seed)  # initial weights and dropout draw from the global generator
    generator = torch.Generator().manual_seed(seed)
    images, held_out = digits_images()
    model, averaged = UNet2DModel(**UNET).train(), UNet2DModel(**UNET).eval()
    averaged.load_state_dict(model.state_dict())
    scheduler = DDPMScheduler(**SCHEDULE)
    levels = scheduler.config["num_train_timesteps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    batches, began, running = _batches(len(images), batch, generator), time.perf_counter(), 0.0
    for step in range(steps):
        _set_rate(optimizer, rate, step, steps)
        clean = images[next(batches)]
        # One timestep from each of `batch` equal ranges: steadier gradients than independent draws.
        spread = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timestep = (spread * levels).to(torch.int64).clamp(max=levels - 1)
        noise = torch.randn(clean.shape, generator=generator)
        predicted = model(scheduler.add_noise(clean, noise, timestep), timestep, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _average(averaged, model, min(decay, (1.0 + step) / (10.0 + step)))
        running = _running(running, loss.item(), step)
        if (step + 1) % 250 == 0:
            print(f"denoiser {step + 1}/{steps} loss {running:.4f} {_losses(averaged, images, held_out)}", flush=True)
    return averaged, {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning_rate": rate,
        "average_decay": decay,
        "train_loss": round(running, 5),
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.no_grad()
def _losses(averaged: nn.Module, images: Tensor, held_out: Tensor) -> str:
    train, unseen = (denoising_loss(averaged, part, seed=1).item() for part in (images[:360], held_out))
    return f"averaged weights: train {train:.4f} held-out {unseen:.4f}"


def judge_denoiser(model: nn.Module, classifier: DigitClassifier) -> Record:
    """Measure a denoiser, beside the distances that give its own a scale.

    Args:
        model: The denoiser, in eval mode.
        classifier: Whose features are compared, in eval mode.

    Returns:
        The loss on held-out digits, and Frechet distances: of 256 and 1024 sampled digits, of 256 real digits
        and of 256 pictures of noise to all real digits, and of the held-out to the train digits.
    """
    train, held_out = digits_images()
    everything = digits_features(torch.cat([train, held_out]), classifier)
    generator = torch.Generator().manual_seed(0)
    pictures = {
        "generated_256": sample_digits(denoiser(model), 256, steps=50, seed=0),
        "generated_1024": sample_digits(denoiser(model), 1024, steps=50, seed=1),
        "real_256": train[torch.randperm(len(train), generator=generator)[:256]],
        "noise_256": torch.randn(256, 1, 8, 8, generator=generator).clamp(-1.0, 1.0),
    }
    features = {name: digits_features(images, classifier) for name, images in pictures.items()}
    distances = {name: frechet_distance(found, everything) for name, found in features.items()}
    distances["held_out_to_train"] = frechet_distance(everything[len(train) :], everything[: len(train)])
    with torch.no_grad():
        loss = sum(denoising_loss(model, held_out, seed=seed).item() for seed in range(8)) / 8
    return {
        "held_out_loss": round(loss, 5),
        "frechet_distance": {name: round(value, 4) for name, value in distances.items()},
    }


def save(model: nn.Module, folder: Path, config: dict[str, Any] | None, record: dict[str, Any]) -> None:
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


def save_denoiser(model: UNet2DModel, folder: Path, record: dict[str, Any]) -> None:
    """Write the denoiser's folder; diffusers writes both configurations, so that it reads them back."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    save(model, folder, None, record)
    model.save_config(folder)
    DDPMScheduler(**SCHEDULE).save_config(folder)


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield endless index batches of one size; every index comes once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images ``[n, 1, 8, 8]``, each moved by at most one pixel along each axis; blank paper moves in."""
    count, side = len(images), images.shape[-1]
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    rows = torch.arange(side).reshape(1, side, 1) + down
    columns = torch.arange(side).reshape(1, 1, side) + right
    return padded[:, 0][torch.arange(count).reshape(count, 1, 1), rows, columns].unsqueeze(1)


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warm: int = 200) -> None:
    """Set the learning rate of a step: linear up over ``warm`` steps, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / warm)
    for group in optimizer.param_groups:
        group["lr"] = peak * rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's, in place."""
    for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1.0 - decay)


def _running(running: float, loss: float, step: int) -> float:
    """Return the moving average of the loss over about 100 steps."""
    return loss if step == 0 else running + (loss - running) / min(step + 1, 100)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` defaults to the process's own."""
    parser = argparse.ArgumentParser(description="Train the built-in digit models.")
    parser.add_argument("--part", choices=("all", "classifier", "denoiser"), default="all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for both models' folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7000, help="of the denoiser")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of both")
    parser.add_argument("--decay", type=float, default=0.999, help="of the denoiser's averaged weights")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums then have one order, whatever the machine
    torch.use_deterministic_algorithms(True)
    folder = options.out / "digits-classifier"
    if options.part != "denoiser":
        judge, record = train_classifier(options.classifier_steps, options.batch, options.rate, options.seed)
        save(judge, folder, judge.config, record)
        print(json.dumps(record))
    if options.part != "classifier":
        judge = DigitClassifier(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
        judge.eval()
        model, record = train_denoiser(options.steps, options.batch, options.rate, options.decay, options.seed)
        record |= judge_denoiser(model, judge)
        save_denoiser(model, options.out / "digits-ddpm", record)
        print(json.dumps(record))


if __name__ == "__main__":
    main()
