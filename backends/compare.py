"""Whether an exported program computes what the program computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph.compare import dynamic_sizes, example_like, other_sizes, relative_difference, tolerance_for
from ..graph.errors import ExportError
from ..graph.program import Program
from .artifacts import summary


@dataclass(frozen=True)
class Check:
    """One call to compare.

    Attributes:
        name: Says which inputs these are.
        inputs: The tensors that the export takes.
        expected: What the program makes of them.
    """

    name: str
    inputs: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]


def default_tolerance(program: Program) -> float:
    """Return the tolerance for the coarsest floating-point type among the program's tensors and inputs."""
    types = {tensor.dtype for tensor in program.tensors().values()} | {spec.dtype for spec in program.inputs}
    inexact = [dtype for dtype in types if dtype is not None and (dtype.is_floating_point or dtype.is_complex)]
    return max(tolerance_for(dtype, "runtime") for dtype in inexact or [torch.float32])


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


def compare(what: str, names: Sequence[str], check: Check, actual: Sequence[Tensor], limit: float) -> dict[str, Any]:
    """Compare what an export returns with what the program returns.

    Args:
        what: The export, as the message calls it.
        names: Of the outputs.
        check: The call.
        actual: What the export made of its inputs.
        limit: Largest `relative_difference` to accept.

    Returns:
        What the manifest says of the check: ``inputs``, ``differences`` by output and ``max_difference``.

    Raises:
        ExportError: The number of outputs differs, or one of them is further off than ``limit``.
    """
    if len(check.expected) != len(actual):
        raise ExportError(f"the export returns {len(actual)} tensors, the program {len(check.expected)}")
    differences = dict(zip(names, relative_difference(actual, check.expected), strict=True))
    name, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= limit:
        got = (
            "another shape, dtype, integer or infinity"
            if math.isinf(worst)
            else f"a relative difference of {worst:.2g}"
        )
        raise ExportError(
            f"{what} does not compute what the program computes: output '{name}' on the {check.name} has {got}, at most "
            f"{limit:.2g} is accepted; nothing was written"
        )
    return {"inputs": check.name, "differences": differences, "max_difference": worst}
