"""The Fisher information of a classifier as a calibration: labels drawn from what the model itself predicts.

    before: batches of inputs
    after:  loss, batches of inputs with a number for each sample, split          Context(loss=..., batches=..., split=...)

The mean over samples of squared gradients is the diagonal of the Fisher matrix if each sample's label is drawn from the
model's softmax; with the data's own labels it is the *empirical* Fisher matrix, which vanishes where the model is right
and sure. Any criterion of squared gradients takes either: ``obdc`` with this loss is that of EigenDamage (1905.05934).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.errors import PreconditionError
from .base import Loss

Batch = tuple[Tensor, Tensor]


def called(module: Any, inputs: Tensor) -> Tensor:
    """Call a module that takes one tensor and returns class scores."""
    return module(inputs)


def drawn_labels(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw a class for each sample from ``softmax(logits)``.

    Args:
        logits: ``[samples, classes]``.
        numbers: Uniform in [0, 1), ``[samples]``. The class is the first up to which the probabilities add up to more.

    Returns:
        ``[samples]``, int64.
    """
    sums = logits.detach().double().softmax(1).cumsum(1)
    # The sum of all may fall short of 1 by rounding.
    return (sums <= numbers.to(sums)[:, None]).sum(1).clamp(max=logits.shape[1] - 1)


def fisher_calibration(
    batches: Iterable[Tensor], seed: int = 0, logits: Callable[[Any, Tensor], Tensor] = called
) -> tuple[Loss, list[Batch], Callable[[Batch], Sequence[Batch]]]:
    """Return the loss, batches and split of a `Context` whose squared gradients are the Fisher information.

    The random numbers are drawn here, one a sample, and kept with the inputs: so the same seed gives the same scores, and
    labels follow the model when several steps change it.

    Args:
        batches: Inputs, ``[samples, ...]`` each.
        seed: Of the random numbers.
        logits: How a program gives class scores ``[samples, classes]`` of inputs; calls it and takes the result unless given.
    """
    generator = torch.Generator().manual_seed(seed)
    numbered = [(batch, torch.rand(len(batch), generator=generator, dtype=torch.float64)) for batch in batches]

    def loss(module: Any, batch: Batch) -> Tensor:
        inputs, numbers = batch
        scores = logits(module, inputs)
        if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != len(numbers):
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PreconditionError(
                f"the Fisher information needs class scores [{len(numbers)}, classes] of a batch of {len(numbers)}, got "
                f"{got}; give fisher_calibration(logits=...) a function that takes them out of what the model returns"
            )
        return nn.functional.cross_entropy(scores, drawn_labels(scores, numbers))

    return loss, numbered, _samples


def _samples(batch: Batch) -> Sequence[Batch]:
    return [(x[None], u[None]) for x, u in zip(*batch, strict=True)]


__all__ = ["called", "drawn_labels", "fisher_calibration"]
