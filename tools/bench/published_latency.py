"""Published pruned classifiers in ONNX Runtime: what the recipes of Isomorphic Pruning save in time, beside counts.

Networks have random weights and lose channels (and blocks) by random scores: which ones go does not matter to the time. Original
and result classify one picture on one thread of the CPU, in turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...backends.onnx_export import export_onnx
from ...backends.onnx_runner import OnnxRunner
from ...graph.cost import cost, parameter_count
from ...graph.program import Program
from ..latency import measure
from .published_networks import ISOMORPHIC, NETWORKS, Network, Setting

ROUNDS = 20


def latencies(networks: Sequence[Network] = NETWORKS, round_to: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row for every published setting of Isomorphic Pruning.

    Args:
        networks: To take the settings from.
        round_to: Widths are multiples of it instead of the published 2.
    """
    for network in networks:
        if network.source != ISOMORPHIC or all(setting.options is None for setting in network.settings):
            continue
        torch.manual_seed(0)
        program = replace(network, weights=True).program()
        with tempfile.TemporaryDirectory() as folder:
            dense = _exported(program, Path(folder, "dense"))
            for setting in network.settings:
                if setting.options is None:
                    continue
                if round_to is not None:
                    setting = replace(setting, options={**setting.options, "round_to": round_to})
                smaller = setting.at_random(program, seed=0)
                yield _row(network, setting, program, smaller, dense, _exported(smaller, Path(folder, setting.name)))


def _exported(program: Program, folder: Path) -> OnnxRunner:
    export_onnx(program, folder, providers=["cpu"], second_shape=False)
    return OnnxRunner(folder, ["cpu"], threads=1)


def _row(
    network: Network, setting: Setting, before: Program, after: Program, dense: OnnxRunner, pruned: OnnxRunner
) -> dict[str, Any]:
    picture = torch.randn(network.shape)
    times = measure({"dense": lambda: dense(picture), "pruned": lambda: pruned(picture)}, ROUNDS)
    row: dict[str, Any] = {"network": network.name, "setting": setting.name}
    row["parameter ratio"] = round(parameter_count(after) / parameter_count(before), 3)
    row["MAC ratio"] = round(cost(after).total_macs / cost(before).total_macs, 3)
    for which in ("median", "fastest"):
        row[f"{which} ratio"] = round(times["pruned"][f"{which}_ms"] / times["dense"][f"{which}_ms"], 3)
    row["dense ms"], row["pruned ms"] = times["dense"]["fastest_ms"], times["pruned"]["fastest_ms"]
    return row
