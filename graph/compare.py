"""Whether two computations of one thing agree: inputs to try, how far apart the outputs are, how far they may be.

One rule for every comparison of this library:

* The difference of an output is its largest absolute difference over the largest magnitude that was expected of it.
* An output that is expected to be zero everywhere has no magnitude; that of all outputs together takes its place, and 1
  where there is none. Whether such an agreement says anything is for the caller to judge (`magnitude`).
* Infinities and NaNs must be in the same places and the same: they are no difference there, and an infinite one
  elsewhere.
* Outputs that are not floating point must be equal: their difference is 0 or infinite.
* Another shape or dtype is an infinite difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .interface import InputSpec
from .program import Program

# What may differ between the two computations.
#   rounding: the same kernels in the same order, but for a few weights that were rescaled.
#   masking: the same kernels over fewer terms, as with a removal and the zeros that it is compared with.
#   runtime: other kernels, other orders, fused operators.
Between = Literal["rounding", "masking", "runtime"]

# Relative to the largest magnitude of the output.
#   rounding: the order of a few sums.
#   masking: sums of other lengths are blocked in other ways. The double bound leaves room for single precision that
#     hardly counts, such as a table of frequencies.
#   runtime: a few hundred roundings of 6e-8 in the deepest nets, times what softmax and norms amplify; two runtimes
#     that do the same sums in another order stay below it. Double is no better there: runtimes compute parts of it in
#     single precision.
_TOLERANCES: Mapping[Between, Mapping[torch.dtype, float]] = {
    "rounding": {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2},
    "masking": {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1},
    "runtime": {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1},
}

# Larger magnitudes mark additive masks, whose pattern has a meaning and is repeated, not drawn.
_MASK_MAGNITUDE = 1e4


def tolerance_for(dtype: torch.dtype, between: Between = "rounding") -> float:
    """Return the largest `relative_difference` to accept for outputs of ``dtype``; 0 for whole numbers and truth values.

    Complex types have the tolerance of their parts. Other floating-point types have that of the coarsest one.
    """
    if dtype.is_complex:
        dtype = dtype.to_real()
    if not dtype.is_floating_point:
        return 0.0
    table = _TOLERANCES[between]
    return table.get(dtype, max(table.values()))


# ---------------------------------------------------------------------- inputs


def dynamic_sizes(program: Program, flat: Sequence[Any] | None = None) -> dict[str, int]:
    """Return the size that every named dynamic dimension has in flat inputs, the example's by default."""
    sizes: dict[str, int] = {}
    for spec, value in zip(program.inputs, program.example if flat is None else flat, strict=True):
        for dim, label in enumerate(spec.shape):
            if isinstance(label, str):
                sizes.setdefault(label, value.shape[dim])
    return sizes


def other_sizes(program: Program) -> Iterator[dict[str, int]]:
    """Yield sizes that differ from the example's in every dynamic dimension, the most telling first.

    A batch (a name that is dimension 0 of an input) gets one more, every other dimension twice its size. A model may
    ask for a divisible size or have a longest sequence, so a doubled batch and halved dimensions follow.
    """
    sizes = dynamic_sizes(program)
    batches = {spec.shape[0] for spec in program.inputs if spec.shape and isinstance(spec.shape[0], str)}
    for halve in (False, True):
        if halve and any(size < 4 for label, size in sizes.items() if label not in batches):
            return
        for double in (False, True):
            yield {
                label: (2 * size if double else size + 1) if label in batches else (size // 2 if halve else 2 * size)
                for label, size in sizes.items()
            }


def example_like(program: Program, sizes: Mapping[str, int] | None = None, seed: int | None = None) -> list[Any]:
    """Return flat inputs like the example's: of other sizes, with other values, or both.

    Values stay inside what the example has, so that indices, timesteps and positions remain valid: floats are drawn
    between two of the example's values, integers between the smallest and the largest. Flags and masks (booleans,
    zeros and ones, infinities) are repeated along their dimensions instead, since their pattern has a meaning.

    Args:
        program: Whose inputs.
        sizes: Size by name of a dynamic dimension; those left out keep the example's.
        seed: Of the drawn values. None repeats the example's values.

    Raises:
        ValueError: ``sizes`` names a dimension that is not dynamic.
    """
    known = dynamic_sizes(program)
    unknown = [label for label in sizes or {} if label not in known]
    if unknown:
        raise ValueError(f"sizes names {unknown}; the dynamic dimensions are {sorted(known)}")
    wanted = {**known, **(sizes or {})}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return [
        _like(spec, value, wanted, generator) if spec.is_tensor else value
        for spec, value in zip(program.inputs, program.example, strict=True)
    ]


def _like(spec: InputSpec, value: Tensor, sizes: Mapping[str, int], generator: torch.Generator | None) -> Tensor:
    tiled = value.detach()
    for dim, label in enumerate(spec.shape):
        if isinstance(label, str) and sizes[label] != value.shape[dim]:
            index = torch.arange(sizes[label], device=value.device) % value.shape[dim]
            tiled = tiled.index_select(dim, index)
    if generator is None or value.numel() == 0 or _has_pattern(value):
        return tiled.clone()
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, tiled.shape, generator=generator, dtype=value.dtype).to(value.device)
    pool = value.detach().cpu().flatten()
    first, second = (pool[torch.randint(len(pool), tiled.shape, generator=generator)] for _ in range(2))
    share = torch.rand(tiled.shape, generator=generator).to(value.dtype)
    return (first + (second - first) * share).to(value.device)


def _has_pattern(value: Tensor) -> bool:
    if value.dtype is torch.bool:
        return True
    if value.dtype.is_floating_point:
        return not bool(value.isfinite().all()) or bool(value.abs().max() >= _MASK_MAGNITUDE)
    return not value.dtype.is_complex and bool(((value == 0) | (value == 1)).all())


# ---------------------------------------------------------------------- outputs


def relative_difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Return how far each output is from what was expected, by the rule at the top.

    Raises:
        ValueError: The numbers of outputs differ.
    """
    largest = max((magnitude(tensor) for tensor in want if _is_inexact(tensor)), default=0.0) or 1.0
    return [
        absolute_difference(a, b) / (magnitude(b) if _is_inexact(b) and magnitude(b) else largest)
        for a, b in zip(got, want, strict=True)
    ]


def absolute_difference(got: Tensor, want: Tensor) -> float:
    """Return the largest absolute difference of one output; infinite where it is no matter of rounding."""
    if want.shape != got.shape or want.dtype is not got.dtype:
        return math.inf
    got, want = got.detach().cpu(), want.detach().cpu()
    if not _is_inexact(want):
        return 0.0 if torch.equal(got, want) else math.inf
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(want.isnan(), got.isnan()):
        return math.inf
    if not torch.equal(want[want.isinf()], got[got.isinf()]):
        return math.inf
    wide = torch.complex128 if want.dtype.is_complex else torch.float64
    gap = (want[finite].to(wide) - got[finite].to(wide)).abs()
    return float(gap.max()) if gap.numel() else 0.0


def magnitude(tensor: Tensor) -> float:
    """Return the largest finite magnitude in ``tensor``, of any dtype; 0 where there is none."""
    values = tensor.detach() if _is_inexact(tensor) else tensor.detach().double()
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex
