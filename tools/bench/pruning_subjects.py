"""What the benchmark of pruning prunes: a trained network, what scores and trains it, and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...frontends.builtin.digits import digits_images, digits_labels
from ...frontends.capture import capture
from ...graph.program import Program
from ...passes.base import Context
from ...passes.trainer import Training, train
from .pruning_models import DigitResNet, DigitViT, pitch_accuracy, pitch_targets, pretrained_crepe, tones

Batch = tuple[Tensor, Tensor]

RESNET = Training(steps=350, learning_rate=4e-3, decay="cosine", warmup=20)
VIT = Training(steps=900, learning_rate=2e-3, weight_decay=0.05, decay="cosine", warmup=50)


@dataclass(frozen=True)
class Bed:
    """One trained network of one seed.

    Attributes:
        program: Captured.
        module: That was captured, in eval mode.
        context: Calibration and training.
        recovery: How much training follows a removal, the same for every contender.
        quality: Of a program or module, in [0, 1]; on data that nothing was trained or scored on.
        dense: Quality before any removal.
        options: Of every removal: which kinds of groups lose something.
    """

    program: Program
    module: nn.Module
    context: Context
    recovery: Mapping[str, Any]
    quality: Callable[[Any], float]
    dense: float
    options: Mapping[str, Any] = field(default_factory=dict)


def resnet(seed: int) -> Bed:
    """Return the residual network, trained from this seed."""
    return _digits(DigitResNet, replace(RESNET, seed=seed))


def vit(seed: int) -> Bed:
    """Return the vision transformer, trained from this seed."""
    return _digits(DigitViT, replace(VIT, seed=seed), {"head_dim_ratio": 0.5})


def crepe(seed: int) -> Bed:
    """Return the pretrained pitch estimator; the seed is of the tones that score and train it."""
    model = pretrained_crepe()
    heard, pitch = tones(200, torch.Generator().manual_seed(1_000_000))

    def loss(module: Any, batch: Batch) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(module(batch[0]), pitch_targets(batch[1]))

    @torch.no_grad()
    def quality(module: Any) -> float:
        return pitch_accuracy(torch.cat([module(part) for part in heard.split(100)]), pitch)

    generator = torch.Generator().manual_seed(seed)
    scored = [tones(32, generator) for _ in range(4)]
    trained = [tones(16, generator) for _ in range(30)]
    context = Context(loss=loss, batches=scored, split=_samples, training=trained)
    recovery = {"steps": 15, "learning_rate": 1e-3, "decay": "cosine"}
    program = capture(model, (heard[:2],))
    return Bed(program, model, context, recovery, quality, quality(program))


SUBJECTS: dict[str, Callable[[int], Bed]] = {"resnet": resnet, "vit": vit, "crepe": crepe}


def _digits(build: Callable[[], nn.Module], training: Training, options: Mapping[str, Any] | None = None) -> Bed:
    """Return a classifier of digits, trained on the train split and judged on the rest."""
    (images, held_out), (labels, held_out_labels) = digits_images(), digits_labels()
    seed = training.seed
    torch.manual_seed(seed)
    model = build().train()
    train(model, classification, Shuffled(images, labels, 64), training)
    model.eval()

    @torch.no_grad()
    def quality(module: Any) -> float:
        return float((module(held_out).argmax(1) == held_out_labels).float().mean())

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    scored = [(images[part], labels[part]) for part in order[:256].split(64)]
    context = Context(loss=classification, batches=scored, split=_samples, training=Shuffled(images, labels, 64))
    recovery = {"steps": 30, "learning_rate": 1e-3, "decay": "cosine", "seed": seed}
    return Bed(capture(model, (images[:2],)), model, context, recovery, quality, quality(model), options or {})


def classification(module: Any, batch: Batch) -> Tensor:
    """Return the mean cross entropy of a batch of images and labels."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@dataclass(frozen=True)
class Shuffled:
    """Batches in an order drawn from torch's generator at each pass."""

    inputs: Tensor
    labels: Tensor
    batch: int

    def __iter__(self) -> Iterator[Batch]:
        for chosen in torch.randperm(len(self.inputs)).split(self.batch):
            yield self.inputs[chosen], self.labels[chosen]


def _samples(batch: Batch) -> Sequence[Batch]:
    return [(x[None], y[None]) for x, y in zip(*batch, strict=True)]
