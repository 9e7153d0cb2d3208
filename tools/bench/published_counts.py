"""``graphwright bench published-counts``: sizes of published pruned networks, from their configurations alone.

    graphwright bench published-counts [--json]
    graphwright bench published-counts --tilted [--json]        pairs that need real scores (`published_tilt`)
    graphwright bench published-counts --latency [--round-to 8] [--json]    time in ONNX Runtime (`published_latency`)

``--networks ResNet-50,MobileNetV2`` takes these only.

Every network is built from its configuration and pruned at the published ratios. Scores are random: which channels go does
not matter, how many does. Where groups compete the counts depend on the scores; those rows say so, and give the range over
seeds. Multiply-accumulates are counted as the published ones are (`published_macs`), which is up to 1 % more than what
`graphwright` counts elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...graph.cost import parameter_count
from ...graph.program import Program, set_tensor
from ...passes.base import Pipeline
from ...passes.remove_channels import RemoveChannels
from .. import render
from .published_latency import latencies
from .published_macs import printed_macs
from .published_networks import CUT, NETWORKS, Network, Setting
from .published_tilt import tilted


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
        """Return the row as plain data.

        ``equal`` is equality at the printed digits, which may be rounded or cut, or being in the range of the seeds.
        """
        digits = len(self.published.partition(".")[2])
        unit, printed = 1 / 10**digits, float(self.published)
        values = self.seeds or [self.ours]
        rounded = min(values) - unit / 2 <= printed <= max(values) + unit / 2
        cut = not rounded and min(values) - unit < printed <= max(values)
        ratio = self.ours / printed
        row = {"source": self.source, "network": self.network, "setting": self.setting, "unit": self.unit}
        row |= {"published": self.published, "ours": round(self.ours, 4), "equal": rounded or cut}
        row["ratio"] = round(ratio, 4)
        if self.seeds and max(self.seeds) > min(self.seeds):
            row["range"] = [round(min(self.seeds), 4), round(max(self.seeds), 4)]
            row["seeds"] = len(self.seeds)
        note = "; ".join(part for part in (self.note, CUT if cut else "") if part)
        return row | ({"note": note} if note else {})


def rows(networks: Sequence[Network] = NETWORKS) -> Iterator[dict[str, Any]]:
    """Yield a row for every published figure."""
    for network in networks:
        program = network.program()
        for setting in network.settings:
            found = [_counts(network, _pruned(network, program, setting, seed)) for seed in range(setting.seeds)]
            for unit, printed, values in (
                ("M parameters", setting.parameters, [parameters / 1e6 for parameters, _ in found]),
                ("G MACs", setting.macs, [macs / 1e9 for _, macs in found]),
            ):
                if printed:
                    mean = sum(values) / len(values)
                    row = Count(network.source, network.name, setting.name, unit, printed, mean, values, setting.note)
                    yield row.data()


def _counts(network: Network, program: Program) -> tuple[int, int]:
    return parameter_count(program), printed_macs(program, network.timm_attention, network.layer_norms)


def _pruned(network: Network, program: Program, setting: Setting, seed: int) -> Program:
    if setting.options is None or not network.weights:
        return setting.at_random(program, seed)
    generator, program = torch.Generator().manual_seed(seed), program.copy()
    for name, parameter in program.parameters().items():
        if parameter.dim() > 1:
            drawn = torch.empty_like(parameter).normal_(std=0.02, generator=generator)
            set_tensor(program.graph_module, name, torch.nn.Parameter(drawn))
    return Pipeline([RemoveChannels(criterion="magnitude-l2", **setting.options)])(program).program


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="graphwright bench published-counts", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one object a row")
    parser.add_argument(
        "--tilted", action="store_true", help="raise later stages' scores to the published MACs instead"
    )
    parser.add_argument("--latency", action="store_true", help="measure pruned classifiers in ONNX Runtime instead")
    parser.add_argument("--round-to", type=int, help="with --latency: multiples that widths are, instead of 2")
    parser.add_argument("--networks", help="names, such as ResNet-50,MobileNetV2; all without")
    options = parser.parse_args(argv)
    networks = _named(parser, options.networks)
    if options.tilted:
        return _others(tilted(networks), options.json)
    if options.latency:
        return _others(latencies(networks, options.round_to), options.json)
    found = []
    for row in rows(networks):
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


def _named(parser: argparse.ArgumentParser, names: str | None) -> Sequence[Network]:
    if names is None:
        return NETWORKS
    known = list(dict.fromkeys(network.name for network in NETWORKS))
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        parser.error(f"--networks: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    return [network for network in NETWORKS if network.name in names.split(",")]


def _others(rows: Iterator[Mapping[str, Any]], as_json: bool) -> int:
    found = []
    for row in rows:
        found.append(row)
        print(f"{row['network']} {row['setting']}", file=sys.stderr)
        if as_json:
            print(json.dumps(row), flush=True)
    if not as_json:
        headers = list(found[0])
        render.print_table("", headers, [list(row.values()) for row in found], right=tuple(range(2, len(headers))))
    return 0


def _ours(row: Mapping[str, Any]) -> str:
    return "{} to {}".format(*row["range"]) if "range" in row else str(row["ours"])


def _note(row: Mapping[str, Any]) -> str:
    return str(row.get("note", ""))
