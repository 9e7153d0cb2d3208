"""Inputs to check an exported program with, and how far its outputs are from the program's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import ExportError
from ..graph.program import InputSpec, Program
from .artifacts import summary

# Relative to the largest magnitude of the output. Float32: a few hundred roundings of 6e-8 in the deepest nets, times
# what softmax and norms amplify; two runtimes that do the same sums in another order stay below it.
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
FLOAT32_TOLERANCE = 1e-4

# Larger magnitudes mark additive masks, whose pattern has a meaning and is repeated, not drawn.
_MASK_MAGNITUDE = 1e4


def default_tolerance(program: Program) -> float:
    """Return the tolerance for the coarsest floating-point type among the program's tensors and inputs."""
    types = {tensor.dtype for tensor in program.tensors().values()} | {spec.dtype for spec in program.inputs}
    return max((TOLERANCES[t] for t in types if t in TOLERANCES), default=FLOAT32_TOLERANCE)


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


def run_program(program: Program, flat: Sequence[Any]) -> tuple[Any, ...]:
    """Return the program's flat outputs, without gradients and in full float32 precision on a GPU."""
    on_gpu = any(tensor.is_cuda for tensor in program.tensors().values())
    with torch.no_grad(), _full_precision() if on_gpu else nullcontext():
        return tuple(program.graph_module(*flat))


@contextmanager
def _full_precision() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    # TF32, the default for convolutions, differs from float32 by more than the tolerance.
    switches: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def inputs_at_other_sizes(program: Program, sizes: Mapping[str, int] | None, seed: int) -> tuple[list[Any], Any]:
    """Return inputs at a second shape and what the program makes of them.

    Args:
        program: With at least one dynamic dimension.
        sizes: Size by name of a dynamic dimension; None tries `other_sizes`.
        seed: Of the drawn values.

    Raises:
        ExportError: The program itself does not run at any of these sizes, so the dimensions are not dynamic.
    """
    failure: Exception | None = None
    tried: list[str] = []
    for candidate in [dict(sizes)] if sizes is not None else other_sizes(program):
        flat = example_like(program, candidate, seed)
        try:
            return flat, run_program(program, flat)
        # Foreign operators refuse shapes with any exception; the last candidate's is part of the report.
        except Exception as err:
            failure = err
            tried.append(describe_sizes(candidate))
    raise ExportError(
        f"{program.name} was captured with dynamic dimensions {sorted(dynamic_sizes(program))} but does not run "
        f"itself at another size (tried {'; '.join(tried)}): {summary(failure)}; capture it with these dimensions static, or "
        "name sizes it can take in second_shape={name: size}"
    ) from failure


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Return ``batch=3, tokens=8``."""
    return ", ".join(f"{label}={size}" for label, size in sizes.items())


def relative_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> list[float]:
    """Return, for each output, the largest absolute difference over the largest magnitude expected.

    An output that is zero everywhere is measured against the largest magnitude of all outputs. The difference is
    infinite where shapes, dtypes or the places of infinities and NaNs differ. Outputs that are not floating point
    must be equal: their difference is 0 or infinite.

    Raises:
        ExportError: The number of outputs differs.
    """
    if len(expected) != len(actual):
        raise ExportError(f"the export returns {len(actual)} tensors, the program {len(expected)}")
    largest = max((_magnitude(tensor) for tensor in expected), default=0.0) or 1.0
    return [
        _difference(want.detach().cpu(), got.detach().cpu(), _magnitude(want) or largest)
        for want, got in zip(expected, actual, strict=True)
    ]


def _difference(want: Tensor, got: Tensor, scale: float) -> float:
    if want.shape != got.shape or want.dtype is not got.dtype:
        return math.inf
    if not want.dtype.is_floating_point and not want.dtype.is_complex:
        return 0.0 if torch.equal(want, got) else math.inf
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(want.isnan(), got.isnan()):
        return math.inf
    if not torch.equal(want[want.isinf()], got[got.isinf()]):
        return math.inf
    wide = torch.complex128 if want.dtype.is_complex else torch.float64
    gap = (want[finite].to(wide) - got[finite].to(wide)).abs()
    return float(gap.max()) / scale if gap.numel() else 0.0


def _magnitude(tensor: Tensor) -> float:
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return 0.0
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
