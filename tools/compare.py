"""Compare what an export computes with the program it was made of, at the example sizes and at others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..backends.compare import dynamic_sizes, example_like, other_sizes, run_program
from ..graph.errors import PreconditionError
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
    reason = next(iter(str(failure).splitlines()), "")
    raise PreconditionError(
        f"{program.name} has the dynamic dimensions {', '.join(dynamic_sizes(program))} but does not run at "
        f"{candidates[-1]}: {reason}; give sizes that it takes in check.second_shape"
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
        A difference is infinite where one side is not finite and the other is not the same.
    """
    flat = inputs_at(program, sizes)
    want = tensors_of(run_program(program, flat))
    args, kwargs = pytree.tree_unflatten(flat, program.in_spec)
    with torch.no_grad():
        got = tensors_of(run(*args, **kwargs))
    if len(want) != len(got):
        raise PreconditionError(f"the export gives {len(got)} outputs, the program {len(want)}")
    outputs = [_difference(a, b) for a, b in zip(want, got, strict=True)]
    return {
        "sizes": {**dynamic_sizes(program), **(sizes or {})},
        **{key: max((o[key] for o in outputs), default=0.0) for key in ("max_abs", "max_rel", "magnitude")},
        "outputs": outputs,
    }


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of any output structure, NumPy arrays included, in order."""
    return [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(value) if hasattr(leaf, "shape")]


def _difference(want: Tensor, got: Tensor) -> dict[str, Any]:
    if want.shape != got.shape:
        raise PreconditionError(
            f"the export gives an output of shape {list(got.shape)}, the program {list(want.shape)}"
        )
    facts: dict[str, Any] = {"shape": list(want.shape), "max_abs": 0.0, "max_rel": 0.0, "magnitude": 0.0}
    a, b = want.detach().cpu().double(), got.detach().cpu().double()
    finite = a.isfinite()
    same = torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) and bool(b[finite].isfinite().all())
    if not same:
        return {**facts, "max_abs": float("inf"), "max_rel": float("inf")}
    if finite.any():
        magnitude, apart = float(a[finite].abs().max()), float((a - b)[finite].abs().max())
        facts |= {"max_abs": apart, "magnitude": magnitude}
        facts["max_rel"] = apart / magnitude if magnitude > 0 else (0.0 if apart == 0 else float("inf"))
    return facts
