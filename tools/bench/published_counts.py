"""``graphwright bench published-counts``: sizes of published pruned networks, from their configurations alone.

    graphwright bench published-counts [--json]

Every network is built on the meta device and pruned at the published ratios. Scores are random: which channels go does
not matter, how many does. Where ranking is global inside a class the counts depend on the scores; those rows say so, and
give the range over seeds. Published multiply-accumulates are counted otherwise (biases, some elementwise
layers), so the ratio says more than equality.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...graph.cost import cost
from ...graph.program import Program
from ...passes.base import Pipeline
from ...passes.remove_channels import RemoveChannels
from .. import render
from .published_networks import NETWORKS, Network, Setting

SEEDS = 3


@dataclass
class Count:
    """One row: a published figure and ours."""

    source: str
    network: str
    setting: str
    unit: str
    published: str
    ours: float
    seeds: list[float] = field(default_factory=list)
    note: str = ""

    def data(self) -> dict[str, Any]:
        """Return the row as plain data: ``equal`` is equality at the printed digits, or being in the range of the seeds."""
        half = 0.5 / 10 ** len(self.published.partition(".")[2])
        values = self.seeds or [self.ours]
        equal = min(values) - half <= float(self.published) <= max(values) + half
        ratio = self.ours / float(self.published)
        row = {"source": self.source, "network": self.network, "setting": self.setting, "unit": self.unit}
        row |= {"published": self.published, "ours": round(self.ours, 4), "equal": equal, "ratio": round(ratio, 4)}
        if self.seeds and max(self.seeds) > min(self.seeds):
            row["range"] = [round(min(self.seeds), 4), round(max(self.seeds), 4)]
        return row | ({"note": self.note} if self.note else {})


def rows(networks: Sequence[Network] = NETWORKS) -> Iterator[dict[str, Any]]:
    """Yield a row for every published figure."""
    for network in networks:
        program = network.program()
        for setting in network.settings:
            seeds = SEEDS if setting.options and setting.options.get("scope") == "isomorphic" else 1
            found = [cost(_pruned(program, setting, seed)) for seed in range(seeds)]
            parameters = [c.parameters / 1e6 for c in found]
            macs = [(c.total_macs if network.products else c.macs) / 1e9 for c in found]
            for unit, printed, values in (
                ("M parameters", setting.parameters, parameters),
                ("G MACs", setting.macs, macs),
            ):
                if printed:
                    mean = sum(values) / len(values)
                    row = Count(network.source, network.name, setting.name, unit, printed, mean, values, setting.note)
                    yield row.data()


def _pruned(program: Program, setting: Setting, seed: int) -> Program:
    if setting.options is None:
        return program
    step = RemoveChannels(criterion="random", seed=seed, **setting.options)
    return Pipeline([step])(program).program


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="graphwright bench published-counts", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one object a row")
    options = parser.parse_args(argv)
    found = []
    for row in rows():
        found.append(row)
        print(f"{row['network']} {row['setting']}: {row['unit']}", file=sys.stderr)
        if options.json:
            print(json.dumps(row), flush=True)
    if not options.json:
        table = [
            [
                r["source"],
                r["network"],
                r["setting"],
                r["unit"],
                r["published"],
                _ours(r),
                r["equal"],
                r["ratio"],
                _note(r),
            ]
            for r in found
        ]
        headers = ["source", "network", "setting", "", "published", "ours", "equal", "ratio", ""]
        render.print_table("", headers, table, right=(4, 5, 7))
    return 0


def _ours(row: Mapping[str, Any]) -> str:
    return "{} to {}".format(*row["range"]) if "range" in row else str(row["ours"])


def _note(row: Mapping[str, Any]) -> str:
    return str(row.get("note", ""))
