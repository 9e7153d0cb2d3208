"""``graphwright bench depgraph``: from a module to a pruned one, beside Torch-Pruning, in CPU seconds of one thread.

Both remove half of the channels and of each head's dimensions by L2 magnitude and keep the last layer. Ours is split
into capture, analysis and removal (scores, plan, resize, verification). Theirs is the pruner's construction, which
builds its graph, and one step. They trace one example; so does our ``capture`` column, and ``any batch`` is what a
capture for any batch size takes instead. ``cached`` is a capture whose graph an earlier run left on disk.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ...frontends.cache import capture_cached
from ...frontends.capture import capture
from ..run_dir import write_atomic
from .architectures import ARCHITECTURES, Subject
from .pruners import ours, runs, theirs
from .timing import Parts, Stopwatch, environment, interleaved, one_thread, sentence

Row = dict[str, dict[str, Any]]

# Header, width, and what of a row to print.
COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("nodes", 6, lambda r: f"{r['ours']['nodes']:.0f}"),
    ("groups", 7, lambda r: f"{r['ours']['groups']:.0f}"),
    ("any batch", 10, lambda r: f"{r['any batch']['capture']:.2f}"),
    ("capture", 8, lambda r: f"{r['ours']['capture']:.2f}"),
    ("cached", 7, lambda r: f"{r['cached']['capture']:.2f}"),
    ("analysis", 9, lambda r: f"{r['ours']['analysis']:.3f}"),
    ("removal", 8, lambda r: f"{removal(r['ours']):.2f}"),
    ("ours", 7, lambda r: f"{r['ours']['total']:.2f}"),
    ("ours cached", 12, lambda r: f"{r['cached']['total']:.2f}"),
    ("theirs", 7, lambda r: f"{r['theirs']['total']:.2f}"),
    ("ratio", 6, lambda r: f"{r['ours']['total'] / r['theirs']['total']:.2f}"),
    ("cached ratio", 13, lambda r: f"{r['cached']['total'] / r['theirs']['total']:.2f}"),
    ("ours after", 12, lambda r: f"{r['ours']['parameters']:,.0f}"),
    ("theirs after", 13, lambda r: f"{r['theirs']['parameters']:,.0f}"),
    ("our module", 11, lambda r: r["ours"]["module"]),
    ("their module", 23, lambda r: r["theirs"]["module"]),
)


def removal(parts: Parts) -> float:
    """Return what follows the analysis: scores, plan, resize and verification."""
    return parts["plan"] + parts["resize"]


def measure(subject: Subject, repeats: int, cache_dir: Path) -> Row:
    """Measure one architecture, each of the ways once a repeat; medians.

    Args:
        subject: The model, which is not changed.
        repeats: How often.
        cache_dir: For captured graphs; filled before the clock runs.
    """
    model, inputs = subject.model, subject.inputs
    modules: dict[str, nn.Module] = {}

    def kept(name: str, made: tuple[Parts, nn.Module]) -> Parts:
        parts, modules[name] = made
        return parts

    def any_batch() -> Parts:
        watch = Stopwatch()
        capture(model, (), inputs)
        watch.lap("capture")
        return watch.parts

    def peer() -> Parts:
        # It prunes in place. What it left of the repeat before goes first: the largest takes gigabytes.
        modules.pop("theirs", None)
        return kept("theirs", theirs(subject._replace(model=copy.deepcopy(model))))

    capture_cached(model, (), inputs, {}, cache_dir)
    row: Row = interleaved(
        {
            "any batch": any_batch,
            "ours": lambda: kept("ours", ours(lambda: capture(model, (), inputs, {}))),
            "cached": lambda: kept("cached", ours(lambda: capture_cached(model, (), inputs, {}, cache_dir))),
            "theirs": peer,
        },
        repeats,
    )
    for name, module in modules.items():
        row[name]["module"] = runs(module, inputs)
    return row


def warm() -> Subject:
    """Return a model small enough to run everything once before it counts."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    return Subject(model, {"input": torch.randn(2, 3, 8, 8)}, 0, ("2",))


def bench(subjects: Iterable[tuple[str, Callable[[], Subject]]], repeats: int, file: Path | None) -> dict[str, Row]:
    """Measure and print one row an architecture as soon as it is there; write all so far to ``file`` as JSON."""
    rows: dict[str, Row] = {}
    with one_thread(), torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        # What the first capture and the first pruner of a process import is not what is compared.
        measure(warm(), 1, Path(folder))
        about = environment("torch-pruning", "transformers", "diffusers")
        print(f"{sentence(about)}; median of {repeats}")
        print(f"{'model':14}" + "".join(f"{header:>{width}}" for header, width, _ in COLUMNS), flush=True)
        for name, build in subjects:
            torch.manual_seed(0)
            rows[name] = measure(build(), repeats, Path(folder))
            print(f"{name:14}" + "".join(f"{show(rows[name]):>{width}}" for _, width, show in COLUMNS), flush=True)
            if file is not None:
                write_atomic(
                    file, json.dumps({"environment": about, "repeats": repeats, "rows": rows}, indent=1) + "\n"
                )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark on the chosen architectures."""
    parser = argparse.ArgumentParser(prog="graphwright bench depgraph", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"architectures: {', '.join(ARCHITECTURES)}; all without")
    parser.add_argument("--repeats", type=int, default=3, help="how often everything is measured; the median counts")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"unknown architecture {unknown[0]!r}; known: {', '.join(ARCHITECTURES)}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    bench([(name, ARCHITECTURES[name]) for name in options.names or ARCHITECTURES], options.repeats, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
