"""Random values for example inputs, from a generator of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
SEED = 0


class Draw:
    """Draws tensors of one float dtype on one device, the same ones for the same seed."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = SEED
    ) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    @classmethod
    def like(cls, model: nn.Module) -> Draw:
        """Draw in the dtype and on the device of the model's first floating-point parameter."""
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return cls(parameter.dtype, parameter.device)
        return cls()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Values in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, *shape: int, high: int, low: int = 0) -> Tensor:
        """Whole numbers in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def tokens(self, *shape: int, vocabulary: int) -> Tensor:
        """Token indices; the lowest three are left out, since they tend to be padding and the like."""
        return self.integers(*shape, low=min(3, vocabulary - 1), high=vocabulary)

    def timesteps(self) -> Tensor:
        """One timestep of 1000 for each sample, int64."""
        return self.integers(BATCH, high=1000)


def field(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of the named fields that a configuration has and that is not None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def pair(size: Any) -> tuple[int, int]:
    """Return a height and a width from one size or two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
