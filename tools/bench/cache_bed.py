"""What caches are judged on: a built-in denoiser of digits, one sampler, one seed, and a counter of what really ran."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...frontends.builtin import load_builtin
from ...frontends.capture import capture
from ...graph.program import Program
from ..digits import digits_frechet, sample_digits

SEED = 0
CLASSES = 10  # and a label of none, as number 10
GUIDANCE = 2.0

# ``denoise(sample [n, 1, 8, 8], timestep [n] int64) -> noise [n, 1, 8, 8]``
Denoise = Callable[[Tensor, Tensor], Tensor]
# Called like the denoiser, all inputs by name.
Model = Callable[..., Any]


@dataclass(frozen=True)
class Drawn:
    """What one run gave.

    Attributes:
        pictures: ``[count, 1, 8, 8]`` in [-1, 1].
        macs: Multiply-accumulates of all evaluations together, attention products included.
    """

    pictures: Tensor
    macs: int

    @cached_property
    def frechet(self) -> float:
        """Distance to the real digits."""
        return digits_frechet(self.pictures)

    def error(self, reference: Drawn) -> float:
        """Return the root of the mean squared difference of pixels, of which the lightest and darkest differ by 2."""
        return float((self.pictures - reference.pictures).square().mean().sqrt())


class Bed:
    """A denoiser with the inputs of its sampling runs.

    Args:
        name: Of a built-in denoiser. One that takes labels draws each class in turn, with classifier-free guidance.
        steps: Evaluations of the uncached run.
        count: Pictures of a run, drawn as one batch.
    """

    def __init__(self, name: str, steps: int = 50, count: int = 500) -> None:
        self.name, self.steps, self.count = name, steps, count
        self.module, args, _ = load_builtin(name)
        self.names = tuple(inspect.signature(self.module.forward).parameters)[: len(args)]
        self.labelled = len(args) > 2

    @cached_property
    def program(self) -> Program:
        """The captured denoiser, for any batch."""
        return capture(self.module, (), self.inputs(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)))

    def inputs(self, sample: Tensor, timestep: Tensor) -> dict[str, Any]:
        """Return the inputs of an evaluation by name; with labels, the rows of no class come before those of the classes."""
        values = [sample, timestep]
        if self.labelled:
            asked = torch.arange(len(sample)) % CLASSES
            values = [torch.cat([v, v]) for v in values] + [torch.cat([torch.full_like(asked, CLASSES), asked])]
        return dict(zip(self.names, values, strict=True)) | {"return_dict": False}

    def denoise(self, model: Model) -> Denoise:
        """Return what the sampler calls."""

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            noise = model(**self.inputs(sample, timestep))[0]
            if not self.labelled:
                return noise
            none, label = noise.chunk(2)
            return none + GUIDANCE * (label - none)

        return denoise

    def draw(self, model: Model, steps: int | None = None, seed: int = SEED) -> Drawn:
        """Draw pictures and count what the run executes."""
        with counting() as counter:
            pictures = sample_digits(self.denoise(model), self.count, steps or self.steps, seed, self.count)
        return Drawn(pictures, counter.get_total_flops() // 2)

    @cached_property
    def uncached(self) -> Drawn:
        """The run that all others are compared with."""
        return self.draw(self.module)

    def fresh(self) -> nn.Module:
        """Return another copy of the denoiser, for hooks that cannot be taken out."""
        return load_builtin(self.name)[0]


def counting() -> Any:
    """Return a context that counts the operations of matrix products, convolutions and attention that run inside it."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # Its table lacks the attention kernel of the CPU.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})
