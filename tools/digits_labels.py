"""The demo with a class-conditional denoiser: digits that were asked for, with classifier-free guidance.

What `digits` is for ``builtin:digits-ddpm``, this is for ``builtin:digits-dit``. Recipes name
``graphwright.tools.digits_labels:calibration`` and ``graphwright.tools.digits_labels:samples``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..frontends.builtin import DigitClassifier, digits_classifier, digits_images, digits_labels
from ..frontends.builtin.digits import CLASSES
from ..graph.errors import PreconditionError
from ..graph.program import Program
from ..passes.base import Progress
from .digits import choose_batches, counted, frechet_note, judged, noisy_batch, require_at_least
from .digits_sampler import MAX_BATCH, Denoise, sample_each
from .samples import Draw, Drawn

# ``denoise(sample [n, 1, 8, 8], timestep [n] int64, labels [n] int64) -> noise [n, 1, 8, 8]``.
LabelledDenoise = Callable[[Tensor, Tensor, Tensor], Any]

# The label of no class.
NULL_LABEL = CLASSES
# The share of the digits that are trained without their label.
WITHOUT_LABEL = 0.1


class LabelledBatch(NamedTuple):
    """Digits with known noise: sample ``[n, 1, 8, 8]``, timestep and labels ``[n]`` int64, noise ``[n, 1, 8, 8]``."""

    sample: Tensor
    timestep: Tensor
    labels: Tensor
    noise: Tensor


def labelled_denoiser(program: Callable[..., Any]) -> LabelledDenoise:
    """Return a `LabelledDenoise` of a program called as ``program(sample, timestep, labels, return_dict=False)[0]``."""

    def denoise(sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return program(sample, timestep, labels, return_dict=False)[0]

    return denoise


def guided(denoise: LabelledDenoise, labels: Tensor, guidance: float) -> Denoise:
    """Return a `Denoise` of pictures of the asked classes.

    Guidance 1 is the prediction for the label. Any other w is ``none + w (label - none)``, with the predictions for no
    class and for the label from one call of twice the rows, those of no class first.

    Args:
        denoise: The class-conditional denoiser.
        labels: ``[n]`` int64, one for each row that the returned function will be given.
        guidance: The weight w of classifier-free guidance; above 1 it goes beyond the label's own prediction.
    """

    def plain(sample: Tensor, timestep: Tensor) -> Any:
        return denoise(sample, timestep, labels.to(sample.device))

    def both(sample: Tensor, timestep: Tensor) -> Tensor:
        asked = torch.cat([torch.full_like(labels, NULL_LABEL), labels]).to(sample.device)
        noise = torch.as_tensor(denoise(torch.cat([sample, sample]), torch.cat([timestep, timestep]), asked))
        if len(noise) != len(asked):
            raise ValueError(f"denoise returned shape {list(noise.shape)} for {len(asked)} rows")
        none, label = noise.chunk(2)
        return none + guidance * (label - none)

    return plain if guidance == 1.0 else both


def sampling(count: int = 16, steps: int = 20, guidance: float = 1.0) -> Callable[[Any, torch.Generator], Tensor]:
    """Return what makes one sampling run, as a recipe's ``sampling`` wants it: digits of classes in turn, noise drawn anew.

    Gradients go through it where they are wanted.

    Args:
        count: Pictures of a run.
        steps: DDIM steps; the denoiser is called once in each.
        guidance: See `guided`.

    Raises:
        ValueError: One of them is too small.
    """
    require_at_least(count=(count, 1), steps=(steps, 1))

    def sample(denoise: Callable[..., Any], generator: torch.Generator) -> Tensor:
        labels = torch.arange(count) % CLASSES
        seed = int(torch.randint(2**31, (), generator=generator))
        predict = labelled_denoiser(denoise)
        return sample_each(lambda pictures: guided(predict, labels[pictures], guidance), count, steps, seed)

    return sample


@torch.no_grad()
def sample_labelled_digits(
    denoise: LabelledDenoise,
    labels: Tensor,
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the digits that ``labels`` ask for, by the sampler of `sample_digits`.

    Args:
        denoise: Predicts the noise, see `LabelledDenoise`; for a module, ``labelled_denoiser(module)``.
        labels: ``[count]`` int64, the class of each picture, 0 to 9, or 10 for whichever comes.
        steps: DDIM steps, 1 to 1000; each calls ``denoise`` once per batch.
        guidance: See `guided`; unless it is 1, a call has twice the rows.
        seed: Of the starting noise.
        batch: Pictures of a batch, by default ``min(count, 128)``; the last is padded to it.
        device: Where ``denoise`` gets its inputs.

    Returns:
        ``[count, 1, 8, 8]``, float32, on the CPU, in [-1, 1].

    Raises:
        ValueError: Labels, steps or batch is out of range, or ``denoise`` returns another shape.
        ImportError: diffusers is not installed.
    """
    if labels.ndim != 1 or labels.dtype != torch.int64 or not ((labels >= 0) & (labels <= NULL_LABEL)).all():
        found = f" from {labels.min()} to {labels.max()}" if labels.numel() else ""
        raise ValueError(
            f"labels must be int64 [count] within 0 to {NULL_LABEL} ({NULL_LABEL} for no class), got {labels.dtype} "
            f"{list(labels.shape)}{found}"
        )
    return sample_each(
        lambda pictures: guided(denoise, labels[pictures], guidance), len(labels), steps, seed, batch, device
    )


@torch.no_grad()
def label_agreement(images: Tensor, labels: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Return the share of pictures ``[n, 1, 8, 8]`` that the (shipped) classifier takes for their labels ``[n]``."""
    model = digits_classifier() if classifier is None else classifier
    return (model(images).argmax(1) == labels).double().mean().item()


def labelled_batch(images: Tensor, labels: Tensor, seed: int = 0) -> LabelledBatch:
    """Add seeded noise at random timesteps to images ``[n, 1, 8, 8]``, as `noisy_batch` does; labels are ``[n]``."""
    sample, timestep, noise = noisy_batch(images, seed)
    return LabelledBatch(sample, timestep, labels, noise)


def labelled_epsilon_loss(program: Callable[..., Any], batch: LabelledBatch) -> Tensor:
    """Return the mean squared error, a scalar, of the noise that a class-conditional ``program`` predicts."""
    predicted = labelled_denoiser(program)(batch.sample, batch.timestep, batch.labels)
    return nn.functional.mse_loss(predicted, batch.noise)


def labelled_loss(module: Callable[..., Any], images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """Return the training loss on given images and labels: mean squared noise error over random timesteps.

    Args:
        module: Module or program, called as ``module(sample, timestep, labels, return_dict=False)[0]``.
        images: ``[n, 1, 8, 8]`` in [-1, 1].
        labels: ``[n]`` int64, 0 to 10.
        seed: Of timesteps and noise; equal seeds make losses of two modules comparable.

    Returns:
        A scalar tensor; 1.0 is what predicting zero scores.
    """
    return labelled_epsilon_loss(module, labelled_batch(images, labels, seed))


def calibration(count: int = 8, batch: int = 64, seed: int = 0) -> tuple[Any, ...]:
    """Return what a gradient-based importance score needs, as a recipe's ``calibration`` wants it.

    Args:
        count: Number of batches of real training digits with their labels.
        batch: Digits in each; count * batch may exceed the 1438 training digits, which then come again.
        seed: Of the choice of digits, timesteps and noise.

    Returns:
        ``(loss, batches, split)``: `labelled_epsilon_loss`, used as ``loss(program, batch)``, the batches, and what
        takes one of them apart into samples.

    Raises:
        ValueError: Count or batch is not positive.
        ImportError: scikit-learn or diffusers is not installed.
    """

    def split(whole: LabelledBatch) -> list[LabelledBatch]:
        return [LabelledBatch(*(part[i : i + 1] for part in whole)) for i in range(len(whole.sample))]

    (images, _), (labels, _) = digits_images(), digits_labels()
    chosen = choose_batches(len(images), count, batch, seed)
    return labelled_epsilon_loss, [labelled_batch(images[some], labels[some], noise) for some, noise in chosen], split


def training(batch: int = 32) -> tuple[Any, ...]:
    """Return what trains a class-conditional denoiser, as a recipe's ``training`` wants it.

    Digits, timesteps and noise are drawn from torch's generator, which the training seeds; every tenth label is that of no
    class, as classifier-free guidance needs it.

    Args:
        batch: Training digits in each.

    Returns:
        ``(loss, batches)``: `labelled_epsilon_loss`, and an iterable whose passes go through all train digits in a new
        order.

    Raises:
        ValueError: Batch is not positive.
    """
    require_at_least(batch=(batch, 1))
    return labelled_epsilon_loss, _LabelledEpochs(batch)


class _LabelledEpochs:
    """Noisy train digits with their labels, drawn anew from torch's generator in each pass."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[LabelledBatch]:
        (images, _), (labels, _) = digits_images(), digits_labels()
        for chosen in torch.randperm(len(images)).split(self.batch):
            kept = torch.rand(len(chosen)) >= WITHOUT_LABEL
            asked = torch.where(kept, labels[chosen], NULL_LABEL)
            yield labelled_batch(images[chosen], asked, int(torch.randint(2**31, ())))


def samples(count: int = 256, steps: int = 25, seed: int = 0, shown: int = 32, guidance: float = 1.0) -> Draw:
    """Return what draws the same digits of asked classes with several models, as a recipe's ``samples`` wants it.

    The classes are asked for in turn. The score is that of `digits.samples`; the note says how many of the pictures the
    shipped classifier takes for what was asked.

    Args:
        count: Pictures by each model; distances of fewer than 256 say little.
        steps: Denoising steps.
        seed: Of the starting noise, the same for every model.
        shown: How many of the pictures are in the report.
        guidance: See `guided`. Guidance makes digits more alike, which by itself raises the distance: with guidance
            of 2, a model from which a little was removed can score better than the original.

    Raises:
        ValueError: Count, steps or shown is too small.
    """
    require_at_least(count=(count, 2), steps=(steps, 1), shown=(shown, 1))

    def draw(program: Program, models: Mapping[str, Callable[..., Any]], folder: Path, progress: Progress) -> Drawn:
        _require_labelled(program)
        labels = torch.arange(count) % CLASSES
        found, right = {}, []
        for label, model in models.items():
            calls = steps * -(-count // MAX_BATCH)
            denoise = counted(labelled_denoiser(model), f"draw digits ({label})", calls, progress)
            images = sample_labelled_digits(denoise, labels, steps, guidance, seed)
            found[label] = judged(images, label, folder, shown)
            right.append(f"{label_agreement(images, labels):.1%} by {label}")
        note = f"{frechet_note(count, steps, seed)} Guidance {guidance:g}; recognised as the asked digit: {', '.join(right)}."
        return Drawn(found, "Frechet distance", note)

    return draw


def _require_labelled(program: Program) -> None:
    """Raise `PreconditionError` unless ``program`` takes what a class-conditional digit denoiser does."""
    shapes = [spec.shape[1:] for spec in program.inputs if spec.is_tensor]
    if shapes != [(1, 8, 8), (), ()]:
        raise PreconditionError(
            "graphwright.tools.digits_labels:samples draws with a denoiser of 8x8 digits that takes labels, such as "
            f"builtin:digits-dit; {program.name} takes other inputs: leave `samples` out of the recipe"
        )
