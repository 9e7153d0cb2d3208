"""Time in CPU seconds of one thread: parts of a run, interleaved repeats, medians, and what the machine was."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Parts = dict[str, float]


class Stopwatch:
    """Names the parts of a run; each part is the CPU seconds of the process since the one before."""

    def __init__(self) -> None:
        self.parts: Parts = {}
        self._since = time.process_time()

    def lap(self, part: str) -> None:
        """End a part; one that is named twice is added up."""
        now = time.process_time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def interleaved(runs: Mapping[str, Callable[[], Parts]], repeats: int) -> dict[str, Parts]:
    """Run everything once, then everything again, so that a slow minute of the machine falls on all of them.

    Returns:
        For each run the median of each part over the repeats. A total is the median of totals, not a sum of medians.
    """
    done: dict[str, list[Parts]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            done[name].append(run())
    return {
        name: {part: statistics.median(r[part] for r in found) for part in found[0]} for name, found in done.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, so that CPU seconds are seconds of work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(*packages: str) -> dict[str, Any]:
    """Return what a table of numbers has to say about where they come from: cores, threads, load, versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load, "versions": versions}


def sentence(environment: Mapping[str, Any]) -> str:
    """Return `environment` as a line of text."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return (
        f"CPU seconds of the process, {environment['threads']} thread, {environment['cores']} cores, "
        f"load {environment['load']} at the start; {versions}"
    )
