"""The demo: draw digits with a denoiser, judge them, and score its channels.

A compiled, pruned or quantised copy of ``builtin:digits-ddpm`` is good if it still draws digits. Everything
here takes any callable, so that an eager module, a program and an ONNX Runtime session are judged alike.
Recipes name two factories: ``graphwright.tools.digits:calibration`` and ``graphwright.tools.digits:samples``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..frontends.builtin import DigitClassifier, digits_classifier, digits_images
from ..graph.errors import PreconditionError
from ..graph.program import Program
from ..passes.base import Progress
from .digits_sampler import MAX_BATCH, SCHEDULE, denoiser, sample_digits
from .frechet import frechet_distance
from .pictures import image_grid
from .samples import Draw, Drawn, Sample


class NoisyBatch(NamedTuple):
    """Digits with known noise: sample ``[n, 1, 8, 8]``, timestep ``[n]`` int64, noise ``[n, 1, 8, 8]``."""

    sample: Tensor
    timestep: Tensor
    noise: Tensor


@torch.no_grad()
def digits_features(images: Tensor, classifier: DigitClassifier | None = None) -> Tensor:
    """Return features ``[n, 64]`` of images ``[n, 1, 8, 8]`` in [-1, 1], by default in the shipped classifier."""
    model = digits_classifier() if classifier is None else classifier
    return torch.cat([model.features(part) for part in images.to(torch.float32).split(512)])


def digits_frechet(images: Tensor) -> float:
    """Return the Frechet distance from pictures to all 1797 real digits, in the shipped classifier's features.

    Args:
        images: ``[n, 1, 8, 8]`` in [-1, 1]; compare distances at equal n only (256 or more).

    Raises:
        ValueError: The shape is another one, or a pixel is not finite.
        ImportError: scikit-learn is not installed.
    """
    if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
        raise ValueError(f"images must be [n, 1, 8, 8], got {list(images.shape)}")
    return frechet_distance(digits_features(images), _real_features())


def noisy_batch(images: Tensor, seed: int = 0) -> NoisyBatch:
    """Add seeded noise at random timesteps to images ``[n, 1, 8, 8]`` in [-1, 1], as in training.

    Timesteps are stratified, one from each n-th of the range 0 to 999, which lowers the variance of a loss.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(**SCHEDULE)
    generator = torch.Generator().manual_seed(seed)
    count, levels = len(images), scheduler.config["num_train_timesteps"]
    spread = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    timestep = (spread * levels).to(torch.int64).clamp(max=levels - 1)
    noise = torch.randn(images.shape, generator=generator)
    return NoisyBatch(scheduler.add_noise(images, noise, timestep), timestep, noise)


def epsilon_loss(program: Callable[..., Any], batch: NoisyBatch) -> Tensor:
    """Return the mean squared error, a scalar, of the noise that ``program(sample, timestep, return_dict=False)[0]`` is."""
    return nn.functional.mse_loss(program(batch.sample, batch.timestep, return_dict=False)[0], batch.noise)


def denoising_loss(module: Callable[..., Any], images: Tensor, seed: int = 0) -> Tensor:
    """Return the training loss on given images: mean squared noise error over random timesteps.

    Args:
        module: Module or program, called as ``module(sample, timestep, return_dict=False)[0]``.
        images: ``[n, 1, 8, 8]`` in [-1, 1].
        seed: Of timesteps and noise; equal seeds make losses of two modules comparable.

    Returns:
        A scalar tensor; 1.0 is what predicting zero scores.
    """
    return epsilon_loss(module, noisy_batch(images, seed))


def taylor_batches(count: int = 8, batch: int = 64, seed: int = 0) -> list[NoisyBatch]:
    """Return noisy batches of real training digits, for importance scores that need gradients.

    Args:
        count: Number of batches.
        batch: Digits in each; count * batch may exceed the 1438 training digits, which then come again.
        seed: Of the choice of digits, timesteps and noise.

    Raises:
        ValueError: Count or batch is not positive.
        ImportError: scikit-learn or diffusers is not installed.
    """
    train, _ = digits_images()
    return [noisy_batch(train[chosen], noise) for chosen, noise in choose_batches(len(train), count, batch, seed)]


def choose_batches(total: int, count: int, batch: int, seed: int) -> list[tuple[Tensor, int]]:
    """Return ``count`` batches of indices below ``total``, int64 ``[batch]``, each with a seed for its noise.

    Raises:
        ValueError: Count or batch is not positive.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count {count} and batch {batch} must be positive")
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(count * batch / total)
    order = torch.cat([torch.randperm(total, generator=generator) for _ in range(rounds)])
    seeds = torch.randint(0, 2**31, (count,), generator=generator).tolist()
    return [(order[i * batch : (i + 1) * batch], seeds[i]) for i in range(count)]


def calibration(count: int = 8, batch: int = 64, seed: int = 0) -> tuple[Any, ...]:
    """Return what a gradient-based importance score needs, as a recipe's ``calibration`` wants it.

    Arguments and errors are those of `taylor_batches`.

    Returns:
        ``(loss, batches, split)``: `epsilon_loss`, used as ``loss(program, batch)``, the batches, and what takes one of
        them apart into samples.
    """

    def split(whole: NoisyBatch) -> list[NoisyBatch]:
        return [NoisyBatch(*(part[i : i + 1] for part in whole)) for i in range(len(whole.sample))]

    return epsilon_loss, taylor_batches(count, batch, seed), split


def timesteps(batch: int = 64, stride: int = 1, seed: int = 0) -> tuple[Any, ...]:
    """Return a calibration with one batch for each timestep, least noise first, as Diff-Pruning takes it (2305.10924).

    The digits and the noise are the same in all of them.

    Args:
        batch: Training digits in each.
        stride: Every so many timesteps; 1 takes all 1000.
        seed: Of the choice of digits and of the noise.

    Returns:
        ``(loss, batches)``: `epsilon_loss` and the batches.

    Raises:
        ValueError: Batch or stride is not positive.
    """
    require_at_least(batch=(batch, 1), stride=(stride, 1))
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(**SCHEDULE)
    train, _ = digits_images()
    ((chosen, noise_seed),) = choose_batches(len(train), 1, batch, seed)
    images = train[chosen]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(noise_seed))
    levels = range(0, scheduler.config["num_train_timesteps"], stride)
    # The scheduler's annotation asks for another class of tensor than it is documented to take.
    times: list[Any] = [torch.full((batch,), level, dtype=torch.int64) for level in levels]
    return epsilon_loss, [NoisyBatch(scheduler.add_noise(images, noise, time), time, noise) for time in times]


def training(batch: int = 32) -> tuple[Any, ...]:
    """Return what trains a denoiser of digits, as a recipe's ``training`` wants it.

    Digits, timesteps and noise are drawn from torch's generator, which the training seeds.

    Args:
        batch: Training digits in each.

    Returns:
        ``(loss, batches)``: `epsilon_loss`, and an iterable whose passes go through all train digits in a new order, with
        new timesteps and noise.

    Raises:
        ValueError: Batch is not positive.
    """
    require_at_least(batch=(batch, 1))
    return epsilon_loss, _NoisyEpochs(batch)


class _NoisyEpochs:
    """Noisy train digits, drawn anew from torch's generator in each pass."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[NoisyBatch]:
        train, _ = digits_images()
        for chosen in torch.randperm(len(train)).split(self.batch):
            yield noisy_batch(train[chosen], int(torch.randint(2**31, ())))


def samples(count: int = 256, steps: int = 25, seed: int = 0, shown: int = 32) -> Draw:
    """Return what draws the same digits with several models and judges them, as a recipe's ``samples`` wants it.

    The score is the squared Frechet distance to the real digits, in features of the shipped classifier.

    Args:
        count: Pictures by each model; distances of fewer than 256 say little.
        steps: Denoising steps.
        seed: Of the starting noise, the same for every model.
        shown: How many of the pictures are in the report.

    Raises:
        ValueError: One of them is too small.
    """
    require_at_least(count=(count, 2), steps=(steps, 1), shown=(shown, 1))

    def draw(program: Program, models: Mapping[str, Callable[..., Any]], folder: Path, progress: Progress) -> Drawn:
        _require_digits(program)
        found = {}
        for label, model in models.items():
            denoise = counted(denoiser(model), f"draw digits ({label})", steps * -(-count // MAX_BATCH), progress)
            images = sample_digits(denoise, count=count, steps=steps, seed=seed)
            found[label] = judged(images, label, folder, shown)
        return Drawn(found, "Frechet distance", frechet_note(count, steps, seed))

    return draw


def require_at_least(**bounds: tuple[int, int]) -> None:
    """Raise `ValueError` for the first of the named values that is less than what comes with it."""
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def judged(images: Tensor, label: str, folder: Path, shown: int) -> Sample:
    """Write the first ``shown`` of the pictures that a model drew into the folder, and score all of them."""
    file = re.sub(r"\W+", "-", label).lower() + ".png"
    (folder / file).write_bytes(image_grid(images[:shown], columns=16, scale=5))
    return Sample(file, digits_frechet(images))


def frechet_note(count: int, steps: int, seed: int) -> str:
    """Return what a reader of Frechet distances of so many pictures should know."""
    real = digits_frechet(_real_digits(count, seed))
    return (
        f"{count} pictures by each in {steps} steps from the same noise (seed {seed}). The distance is to the real "
        f"digits, in features of the shipped classifier; as many real digits have {real:.2f}, lower is better."
    )


def _require_digits(program: Program) -> None:
    """Raise `PreconditionError` unless ``program`` takes what a digit denoiser does."""
    shapes = [spec.shape[1:] for spec in program.inputs if spec.is_tensor]
    if shapes != [(1, 8, 8), ()]:
        raise PreconditionError(
            "graphwright.tools.digits:samples draws with a denoiser of 8x8 digits such as builtin:digits-ddpm; "
            f"{program.name} takes other inputs: leave `samples` out of the recipe"
        )


def counted(denoise: Callable[..., Any], what: str, total: int, progress: Progress) -> Callable[..., Any]:
    """Return ``denoise`` that tells ``progress`` of each of its ``total`` calls."""
    done = 0

    def told(*inputs: Tensor) -> Any:
        nonlocal done
        noise = denoise(*inputs)
        done += 1
        progress(what, done, total)
        return noise

    return told


def _real_digits(count: int, seed: int) -> Tensor:
    """Return ``count`` real digits, drawn with replacement where there are not so many."""
    images = torch.cat(digits_images())
    generator = torch.Generator().manual_seed(seed)
    if count <= len(images):
        return images[torch.randperm(len(images), generator=generator)[:count]]
    return images[torch.randint(len(images), (count,), generator=generator)]


@cache
def _real_features() -> Tensor:
    """Return features of every real digit ``[1797, 64]``; they never change, and reading the digits is slow."""
    return digits_features(torch.cat(digits_images()))
