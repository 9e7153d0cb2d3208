"""Compare what an export computes with the program it was made of, at the example sizes and at others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..backends.compare import run_program
from ..graph.compare import (
    absolute_difference,
    dynamic_sizes,
    example_like,
    magnitude,
    other_sizes,
    relative_difference,
)
from ..graph.errors import PreconditionError, first_line
from ..graph.program import Program

Run = Callable[..., Any]
SEED = 1


def inputs_at(program: Program, sizes: Mapping[str, int] | None, seed: int | None = SEED) -> list[Any]:
    """Return flat inputs like the example's at ``sizes`` of the dynamic dimensions.

    Raises:
        PreconditionError: ``sizes`` names a dimension that is not dynamic.
    """
    try:
        return example_like(program, sizes, seed)
    except ValueError as err:
        raise PreconditionError(str(err)) from None


def second_sizes(program: Program, wanted: bool | Mapping[str, int]) -> dict[str, int] | None:
    """Return the sizes for a second comparison, None where there is nothing to vary or it is not wanted.

    Raises:
        PreconditionError: ``wanted`` names a dimension that is not dynamic, or the program runs at no other size.
    """
    if wanted is False or not dynamic_sizes(program):
        return None
    candidates = [dict(wanted)] if isinstance(wanted, Mapping) else list(other_sizes(program))
    failure: Exception | None = None
    for sizes in candidates:
        flat = inputs_at(program, sizes)
        try:
            run_program(program, flat)
        # Operators refuse shapes with any exception; the last one is part of the message.
        except Exception as err:
            failure = err
            continue
        return {**dynamic_sizes(program), **sizes}
    assert failure is not None
    raise PreconditionError(
        f"{program.name} has the dynamic dimensions {', '.join(dynamic_sizes(program))} but does not run at "
        f"{candidates[-1]}: {first_line(failure)}; give sizes that it takes in check.second_shape"
    ) from failure


def differences(program: Program, run: Run, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Run both on the same inputs and measure how far the outputs are apart.

    Args:
        program: The reference.
        run: Called like the program.
        sizes: Of the dynamic dimensions; None takes the example's.

    Returns:
        ``sizes``; ``max_abs``, the largest difference of any output; ``max_rel``, the largest of the differences over
        the largest magnitude of their output; ``magnitude``, the largest magnitude; ``outputs``, the same of each.
        What counts as a difference, and where it is infinite, says `graph.compare`.
    """
    flat = inputs_at(program, sizes)
    want = tensors_of(run_program(program, flat))
    args, kwargs = pytree.tree_unflatten(flat, program.in_spec)
    with torch.no_grad():
        got = tensors_of(run(*args, **kwargs))
    if len(want) != len(got):
        raise PreconditionError(f"the export gives {len(got)} outputs, the program {len(want)}")
    for a, b in zip(want, got, strict=True):
        if a.shape != b.shape:
            raise PreconditionError(f"the export gives an output of shape {list(b.shape)}, the program {list(a.shape)}")
    outputs: list[dict[str, Any]] = [
        {
            "shape": list(a.shape),
            "max_abs": absolute_difference(b, a),
            "max_rel": relative,
            "magnitude": magnitude(a),
        }
        for a, b, relative in zip(want, got, relative_difference(got, want), strict=True)
    ]
    return {
        "sizes": {**dynamic_sizes(program), **(sizes or {})},
        **{key: max((o[key] for o in outputs), default=0.0) for key in ("max_abs", "max_rel", "magnitude")},
        "outputs": outputs,
    }


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of any output structure, NumPy arrays included, in order."""
    return [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(value) if hasattr(leaf, "shape")]
