"""How a module is trained: the options of the trainer, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options),
}
# Fraction of the peak learning rate by the fraction of the steps that is done after warming up.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a module is trained.

    Attributes:
        steps: Optimiser steps.
        learning_rate: At its peak.
        optimizer: One of `OPTIMIZERS`; ``sgd`` has a momentum of 0.9.
        weight_decay: Of the optimiser.
        decay: Of the learning rate after warming up: one of `DECAYS`.
        warmup: Steps over which the learning rate rises linearly.
        clip: Largest norm of the gradient; 0 does not clip.
        average: Decay of the moving average of weights, which is what comes out; 0 for the last weights. It starts lower,
            ``(1 + step) / (10 + step)``, so that the first weights are soon forgotten.
        precision: ``no``, ``fp16`` or ``bf16``: of the computation; weights stay as they are.
        accumulate: Batches of a step.
        seed: Of the order of a shuffling loader and of whatever a loss draws from torch's generator.
        save_every: Steps between checkpoints.
    """

    steps: int
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    decay: str = "constant"
    warmup: int = 0
    clip: float = 1.0
    average: float = 0.0
    precision: str = "no"
    accumulate: int = 1
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("decay", DECAYS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("accumulate", 1), ("save_every", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1), got {self.average!r}")
