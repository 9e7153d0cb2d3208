"""A module made of parts and one function, and the inputs of the odd cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .entry import Case, Entry, case, image, source


class Net(nn.Module):
    """Named parts and a function of the module and its input; one small topology per instance."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        """`parts`: modules, parameters, or (as plain tensors) buffers."""
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    if TYPE_CHECKING:  # parts are whatever the constructor was given

        def __getattr__(self, name: str) -> Any:
            """Parts by name."""

    def forward(self, x: torch.Tensor) -> Any:
        """Call the function."""
        return self.function(self, x)


def conv(cin: int, cout: int, k: int = 3, **more: Any) -> nn.Conv2d:
    """A convolution that keeps the spatial size (odd k)."""
    return nn.Conv2d(cin, cout, k, padding=more.pop("padding", k // 2), **more)


def lin(cin: int, cout: int, **more: Any) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(cin, cout, **more)


def param(*shape: int) -> nn.Parameter:
    """A parameter that the initialisation fills."""
    return nn.Parameter(torch.zeros(shape))


def buffer(*shape: int, seed: int = 9) -> torch.Tensor:
    """A constant with values away from zero."""
    return 0.5 + torch.rand(shape, generator=source(seed))


def pictures(b: int) -> torch.Tensor:
    """(batch, 3, 8, 8)."""
    return image(b, 3, 8, 8)


def features(b: int) -> torch.Tensor:
    """(batch, 7, 5): token features."""
    return torch.randn(b, 7, 5, generator=source(b + 3))


def vectors(b: int) -> torch.Tensor:
    """(batch, 5), more rows than the usual batch so that rectified units wake."""
    return torch.randn(b, 5, generator=source(b + 4))


def odd(
    name: str,
    build: Callable[[], nn.Module | Case],
    inputs: Callable[[int], Any] = pictures,
    note: str = "",
    requires: tuple[str, ...] = (),
    **options: Any,
) -> Entry:
    """An entry of the family "odd"; `build` makes the module, or the whole case."""

    def make() -> Case:
        made = build()
        return made if isinstance(made, Case) else case(made, inputs, **options)

    return Entry(name, "odd", make, requires, note)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """(b, n, count * d) to (b, count, n, d); the head size is left to be inferred."""
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def merge(x: torch.Tensor) -> torch.Tensor:
    """(b, heads, n, d) to (b, n, heads * d)."""
    return x.transpose(1, 2).flatten(2)
