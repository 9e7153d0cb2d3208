"""Compare what an export computes with the program it was made of, at the example sizes and at others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..graph.errors import PreconditionError
from ..graph.program import Program

Run = Callable[..., Any]
BATCH = "batch"


def dynamic_sizes(program: Program) -> dict[str, int]:
    """Return the example size of every dynamic dimension, by its name."""
    sizes: dict[str, int] = {}
    for spec, leaf in zip(program.inputs, program.example, strict=True):
        for dim, size in enumerate(spec.shape):
            if isinstance(size, str):
                sizes[size] = int(leaf.shape[dim])
    return sizes


def second_sizes(program: Program, wanted: bool | Mapping[str, int]) -> dict[str, int] | None:
    """Return the sizes of the second comparison; None where there is nothing to vary or it is not wanted.

    Raises:
        PreconditionError: ``wanted`` names a dimension that is not dynamic.
    """
    known = dynamic_sizes(program)
    if isinstance(wanted, Mapping):
        for name in wanted:
            if name not in known:
                raise PreconditionError(
                    f"check.second_shape names the dimension {name!r}; the dynamic ones are {', '.join(known) or 'none'}"
                )
        return {**known, **wanted}
    if not wanted or not known:
        return None
    return {name: size + 1 if name == BATCH else 2 * size for name, size in known.items()}


def inputs_at(program: Program, sizes: Mapping[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs with their dynamic dimensions at ``sizes``, by repeating or dropping indices."""
    leaves = []
    for spec, value in zip(program.inputs, program.example, strict=True):
        for dim, name in enumerate(spec.shape):
            if isinstance(name, str) and name in sizes and isinstance(value, Tensor):
                index = torch.arange(sizes[name], device=value.device) % value.shape[dim]
                value = value.index_select(dim, index)
        leaves.append(value)
    return pytree.tree_unflatten(leaves, program.in_spec)


@torch.no_grad()
def differences(program: Program, run: Run, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Run both on the same inputs and measure how far the outputs are apart.

    Args:
        program: The reference.
        run: Called like the program.
        sizes: Of the dynamic dimensions.

    Returns:
        ``sizes``; ``max_abs``, the largest difference of any output; ``max_rel``, the largest of the differences
        divided by the largest magnitude of their output; ``magnitude``, the largest magnitude; ``outputs``.
    """
    args, kwargs = inputs_at(program, sizes)
    want = tensors_of(program(*args, **kwargs))
    got = tensors_of(run(*args, **kwargs))
    if len(want) != len(got):
        raise PreconditionError(f"the export gives {len(got)} outputs, the program {len(want)}")
    outputs = [_difference(a, b) for a, b in zip(want, got, strict=True)]
    return {
        "sizes": dict(sizes),
        "max_abs": max((o["max_abs"] for o in outputs), default=0.0),
        "max_rel": max((o["max_rel"] for o in outputs), default=0.0),
        "magnitude": max((o["magnitude"] for o in outputs), default=0.0),
        "outputs": outputs,
    }


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of any output structure, NumPy arrays included, in order."""
    leaves, _ = pytree.tree_flatten(value)
    return [torch.as_tensor(leaf) for leaf in leaves if leaf is not None and hasattr(leaf, "shape")]


def _difference(want: Tensor, got: Tensor) -> dict[str, Any]:
    if want.shape != got.shape:
        raise PreconditionError(f"the export gives an output of shape {list(got.shape)}, the program {list(want.shape)}")
    if not want.numel():
        return {"shape": list(want.shape), "max_abs": 0.0, "max_rel": 0.0, "magnitude": 0.0}
    a, b = want.detach().cpu().double(), got.detach().cpu().double()
    magnitude, apart = float(a.abs().max()), float((a - b).abs().max())
    # A difference that is no number must fail every tolerance and still be valid JSON.
    apart = apart if apart == apart else float("inf")
    relative = apart / magnitude if magnitude > 0 else (0.0 if apart == 0 else float("inf"))
    return {"shape": list(want.shape), "max_abs": apart, "max_rel": relative, "magnitude": magnitude}
