"""Train the built-in digit models and write their folders.

    python -m graphwright.tools.train_digits                      # all, about 45 minutes on one core
    python -m graphwright.tools.train_digits --part classifier    # a minute

Runs on one CPU thread with seeded generators, so that the same versions of the same libraries on the same
kind of processor write the same weights. ``training.json`` in each folder records the settings and the
measured quality. The classifier comes first: it judges the denoisers. Needs ``graphwright[hf,digits]``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..frontends.builtin.digits import FOLDER, DigitClassifier, digits_images, digits_labels
from .digits import denoising_loss, digits_features
from .digits_sampler import denoiser, sample_digits
from .frechet import frechet_distance
from .train_dit import RATE, judge_dit, train_dit
from .training import Record, Settings, fit_denoiser, index_batches, running, save, save_denoiser, set_rate

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

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
    batches, began, smooth = index_batches(len(images), batch, generator), time.perf_counter(), 0.0
    for step in range(steps):
        set_rate(optimizer, rate, step, steps)
        chosen = next(batches)
        inputs = _shifted(images[chosen], generator)
        inputs = inputs + 0.1 * torch.randn(inputs.shape, generator=generator)
        loss = nn.functional.cross_entropy(model(inputs), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smooth = running(smooth, loss.item(), step)
        if (step + 1) % 250 == 0:
            print(f"classifier {step + 1}/{steps} loss {smooth:.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        accuracy = (model(held_out).argmax(1) == held_out_labels).double().mean().item()
    return model, {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning_rate": rate,
        "train_loss": round(smooth, 5),
        "held_out_accuracy": round(accuracy, 5),
        "seconds": round(time.perf_counter() - began, 1),
    }


def train_denoiser(settings: Settings) -> tuple[UNet2DModel, Record]:
    """Train the noise predictor on the train split and keep the moving average of its weights.

    Returns:
        The averaged model in eval mode, and what to record about its training.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    def predict(model: nn.Module, sample: Tensor, timestep: Tensor, *_: Any) -> Tensor:
        return model(sample, timestep, return_dict=False)[0]

    return fit_denoiser(lambda: UNet2DModel(**UNET), predict, _losses, settings)


@torch.no_grad()
def _losses(averaged: nn.Module) -> str:
    train, unseen = (denoising_loss(averaged, part[:360], seed=1).item() for part in digits_images())
    return f"train {train:.4f} held-out {unseen:.4f}"


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


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images ``[n, 1, 8, 8]``, each moved by at most one pixel along each axis; blank paper moves in."""
    count, side = len(images), images.shape[-1]
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    rows = torch.arange(side).reshape(1, side, 1) + down
    columns = torch.arange(side).reshape(1, 1, side) + right
    return padded[:, 0][torch.arange(count).reshape(count, 1, 1), rows, columns].unsqueeze(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` defaults to the process's own."""
    parser = argparse.ArgumentParser(description="Train the built-in digit models.")
    parser.add_argument("--part", choices=("all", "classifier", "denoiser", "dit"), default="all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the models' folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7000, help="of each denoiser")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, help=f"peak learning rate, by default 1e-3 ({RATE:g} for dit)")
    parser.add_argument("--decay", type=float, default=0.999, help="of the denoisers' averaged weights")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums then have one order, whatever the machine
    torch.use_deterministic_algorithms(True)
    folder = options.out / "digits-classifier"

    def rate_of(usual: float) -> float:
        return usual if options.rate is None else options.rate

    if options.part in ("all", "classifier"):
        judge, record = train_classifier(options.classifier_steps, options.batch, rate_of(1e-3), options.seed)
        save(judge, folder, judge.config, record)
        print(json.dumps(record))
    for part, name, rate, train, measure in (
        ("denoiser", "digits-ddpm", 1e-3, train_denoiser, judge_denoiser),
        ("dit", "digits-dit", RATE, train_dit, judge_dit),
    ):
        if options.part in ("all", part):
            settings = Settings(options.steps, options.batch, rate_of(rate), options.decay, options.seed)
            model, record = train(settings)
            record |= measure(model, _saved_classifier(folder))
            save_denoiser(model, options.out / name, record)
            print(json.dumps(record))


def _saved_classifier(folder: Path) -> DigitClassifier:
    """Return the classifier of a folder that `save` wrote, in eval mode."""
    judge = DigitClassifier(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.eval()


if __name__ == "__main__":
    main()
