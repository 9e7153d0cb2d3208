"""What a run has to call when it is through: the model as it was and as it came out, in PyTorch and exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree

from ..graph.errors import PreconditionError
from ..graph.plan import Plan
from ..graph.program import Program
from .artifacts import load_call
from .compare import inputs_at
from .outputs import Output, callable_of, programs_of


@dataclass(frozen=True)
class Candidate:
    """One thing that can be called like the model.

    Attributes:
        label: ``original`` or ``result``.
        output: In PyTorch.
        export: Directory of its ONNX export; None if there is none.
        providers: Execution providers of ONNX Runtime.
    """

    label: str
    output: Output
    export: Path | None
    providers: tuple[str, ...] | None


def models(candidates: Iterable[Candidate]) -> dict[str, Callable[..., Any]]:
    """Return what is called like the model, by label: the export, or PyTorch where there is none."""
    return {
        f"{c.label}, PyTorch" if c.export is None else f"{c.label}, ONNX Runtime": callable_of(c.output)
        if c.export is None
        else load_call(c.export, 1, c.providers)
        for c in candidates
    }


def bound_calls(
    candidates: Iterable[Candidate], threads: int | None, batch: int | None
) -> dict[str, Callable[[], Any]]:
    """Return every single program as a call on inputs that fit it, in PyTorch and exported.

    Args:
        candidates: A plan among them is taken apart: each stage by its name.
        threads: For ONNX Runtime.
        batch: Size of the batch; None takes the example's.

    Raises:
        PreconditionError: A batch is given, and the model's is fixed.
    """
    found: dict[str, Callable[[], Any]] = {}
    for candidate in candidates:
        staged = isinstance(candidate.output, Plan)
        for name, program in programs_of(candidate.output).items():
            label = name if staged else candidate.label
            sizes = {} if batch is None else dict.fromkeys(batch_names(program), batch)
            args, kwargs = pytree.tree_unflatten(inputs_at(program, sizes), program.in_spec)
            calls: dict[str, Callable[..., Any]] = {f"{label}, PyTorch": program}
            if candidate.export is not None:
                stage = name if staged else None
                calls[f"{label}, ONNX Runtime"] = load_call(candidate.export, threads, candidate.providers, stage)
            found |= {key: lambda c=call, a=args, k=kwargs: c(*a, **k) for key, call in calls.items()}
    return found


def batch_names(program: Program) -> list[str]:
    """Return the names of what varies in dimension 0 of the inputs.

    Raises:
        PreconditionError: Nothing varies there.
    """
    first = [spec.shape[0] for spec in program.inputs if spec.is_tensor and spec.shape]
    names = list(dict.fromkeys(size for size in first if isinstance(size, str)))
    if not names:
        raise PreconditionError(
            f"measure.batch needs an input of {program.name} whose dimension 0 varies, and all are fixed: leave it out, "
            "or name the dimension under `dynamic`"
        )
    return names
