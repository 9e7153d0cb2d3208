"""The program as a module, for PyTorch itself to run."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..graph.program import Program


def to_module(program: Program, compile: bool = False, **options: Any) -> nn.Module:
    """Return ``program`` as a module with the signature of the captured one.

    Args:
        program: What to run. The module shares its tensors and follows its later rewrites.
        compile: Return ``torch.compile`` of the module: slower at the first call, which needs a C++ compiler with
            torch's default backend, and again at inputs of another shape.
        options: For ``torch.compile``, such as ``mode="max-autotune"`` or ``backend="aot_eager"``.

    Raises:
        ValueError: Options without ``compile=True``.
    """
    module = program.module()
    if compile:
        return cast(nn.Module, torch.compile(module, **options))
    if options:
        raise ValueError(f"the options {sorted(options)} are for torch.compile; add compile=True")
    return module
