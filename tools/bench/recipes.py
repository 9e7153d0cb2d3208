"""``graphwright bench recipes``: what the removals of shipped recipes save in ONNX Runtime, beside what they save in counts.

    graphwright bench recipes [--names diff-pruning,isomorphic,depgraph] [--out DIR] [--json]

Each recipe runs whole: calibration, removal, training, export, samples, latency of one batch on one thread. Times of the
original and of the result are taken in turns, 20 of each; ratios are of the medians, and of the fastest in brackets, which
other processes disturb less. A directory of an earlier run is used: what is done there is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import render
from ..recipe import load_recipe
from ..report import write_report
from ..run import Runner
from .cache_rows import Row, progress

NAMES = ("diff-pruning", "isomorphic", "depgraph")
RUNTIMES = ("ONNX Runtime", "PyTorch")


def run(names: Sequence[str], out: Path, overrides: Sequence[str] = ()) -> Iterator[Row]:
    """Yield a row for every recipe."""
    for name in names:
        progress(f"{name} ...")
        yield row(name, write_report(Runner(load_recipe(name, overrides), out / name)()))


def row(name: str, report: Mapping[str, Any]) -> Row:
    """Return what a run's report says of cost, latency and samples before and after."""
    before, after = report["cost"]["before"], report["cost"]["after"]
    found: Row = {
        "recipe": name,
        "parameter_ratio": round(after["parameters"] / before["parameters"], 4),
        "mac_ratio": round(after["total_macs"] / before["total_macs"], 4),
        "batch": report["latency"]["batch"],
        "threads": report["latency"]["threads"],
    }
    times = report["latency"]["times"]
    for runtime in RUNTIMES:
        original, result = times[f"original, {runtime}"], times[f"result, {runtime}"]
        for which in ("median", "fastest"):
            ratio = result[f"{which}_ms"] / original[f"{which}_ms"]
            found[f"latency_ratio, {runtime}, {which}"] = round(ratio, 4)
        found[f"median_ms, {runtime}"] = [original["median_ms"], result["median_ms"]]
    scores = {name.partition(",")[0]: drawn["score"] for name, drawn in report["samples"]["models"].items()}
    return found | {"frechet": [round(scores["original"], 3), round(scores["result"], 3)]}


def line(found: Row) -> list[str]:
    """Return a row of the table."""
    cells = [found["recipe"], f"{found['parameter_ratio']:.3f}", f"{found['mac_ratio']:.3f}"]
    for runtime in RUNTIMES:
        median, fastest = (found[f"latency_ratio, {runtime}, {which}"] for which in ("median", "fastest"))
        cells.append(f"{median:.2f} ({fastest:.2f})")
    return [*cells, "{:.2f} to {:.2f}".format(*found["frechet"])]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="graphwright bench recipes", description=__doc__)
    parser.add_argument("--names", default=",".join(NAMES), help="of shipped recipes with samples")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="directory of the runs")
    parser.add_argument("--json", action="store_true", help="one object a row instead of a table")
    options = parser.parse_args(argv)
    rows = []
    for found in run(options.names.split(","), options.out):
        rows.append(found)
        if options.json:
            print(json.dumps(found), flush=True)
    if not options.json:
        columns = ["recipe", "parameters", "MACs", *(f"latency, {runtime}" for runtime in RUNTIMES), "Frechet distance"]
        render.print_table("what is left", columns, [line(found) for found in rows])
    return 0
