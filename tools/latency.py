"""Latency of several ways to run the same inputs, measured side by side."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..graph.program import Program
from ..passes.base import Progress
from .artifacts import export_onnx
from .recipe_schema import Check, Measure, OnnxExport

WARM_UP = 2
LEAST_RUNS = 3
BUDGET_SECONDS = 60.0

Call = Callable[[], Any]


def measure(calls: Mapping[str, Call], runs: int, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Time every call ``runs`` times, in turns, so that whatever else the machine does falls on all of them alike.

    Slow calls are timed fewer times: at least `LEAST_RUNS`, and no further round after `BUDGET_SECONDS`.

    Args:
        calls: What to time, by name.
        runs: Rounds; in each, every call is timed once.
        progress: Called with ``("latency", done, total)``.

    Returns:
        By name: ``median_ms``, ``fastest_ms``, ``slowest_ms``, ``runs``.
    """
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(runs):
        if done >= LEAST_RUNS and time.perf_counter() - begin > BUDGET_SECONDS:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
        if progress is not None:
            progress("latency", done + 1, runs)
    return {
        name: {
            "median_ms": round(statistics.median(found), 4),
            "fastest_ms": round(min(found), 4),
            "slowest_ms": round(max(found), 4),
            "runs": len(found),
        }
        for name, found in times.items()
    }


def latency_of(options: Measure | None, onnx: OnnxExport | None) -> Callable[[Program], float]:
    """Return what measures a program for a latency target: seconds of a call, the median of interleaved runs.

    Args:
        options: Threads, runs and batch.
        onnx: Measure in ONNX Runtime, exported like this; None measures in PyTorch.
    """
    options = options or Measure()

    def seconds(program: Program) -> float:
        from .run_calls import Candidate, bound_calls

        with tempfile.TemporaryDirectory() as scratch, torch_threads(options.threads), torch.no_grad():
            export = None
            if onnx is not None:
                export = Path(scratch) / "onnx"
                export_onnx(program, export, onnx, Check(second_shape=False))
            candidate = Candidate("candidate", program, export, onnx.providers if onnx is not None else None)
            calls = bound_calls([candidate], options.threads, options.batch)
            name = list(calls)[-1]  # the export's, if there is one
            return measure({name: calls[name]}, options.runs)[name]["median_ms"] / 1000

    return seconds


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Let PyTorch use ``count`` threads inside the block; None changes nothing. Yields how many it uses."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
