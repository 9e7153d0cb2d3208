"""The parameters and buffers of a module by name."""

from __future__ import annotations

from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of ``model`` by name; tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called ``name``."""
    path, _, short = name.rpartition(".")
    return getattr(model.get_submodule(path), short)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Bind ``name``, a parameter or buffer that ``model`` has, to another tensor."""
    path, _, short = name.rpartition(".")
    setattr(model.get_submodule(path), short, tensor)
