"""``graphwright bench depgraph``: from a module to a pruned one, beside Torch-Pruning, in CPU seconds of one thread.

Ours is split into capture, analysis, and removal (scores, plan, resize, verification); theirs into construction of the
pruner, which builds the graph, and the step. Both remove half of the channels by L2 magnitude and keep the last layer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...frontends.capture import capture
from ...graph.cost import parameter_count
from ...graph.depgraph import depgraph
from ...passes.base import Context
from ...passes.remove_channels import RemoveChannels
from .architectures import ARCHITECTURES, Subject


def ours(subject: Subject) -> dict[str, float]:
    """Return CPU seconds of each part, nodes and groups, and parameters after."""
    row: dict[str, float] = {}
    program = _timed(row, "capture", lambda: capture(subject.model, (), subject.inputs))
    graph = _timed(row, "analysis", lambda: depgraph(program))
    groups = _timed(row, "groups", lambda: graph.groups)
    _timed(row, "removal", lambda: RemoveChannels(ratio=0.5)(program, Context()))
    row["total"] = row["capture"] + row["analysis"] + row["groups"] + row["removal"]
    row["nodes"], row["group_count"] = sum(1 for _ in program.nodes), len(groups)
    row["parameters"] = sum(p.numel() for p in {id(p): p for p in program.parameters().values()}.values())
    return row


def theirs(subject: Subject) -> dict[str, float]:
    """Return CPU seconds of Torch-Pruning's pruner construction and step, and parameters after."""
    import torch_pruning

    row: dict[str, float] = {}
    modules = dict(subject.model.named_modules())
    heads = {m: subject.heads for name, m in modules.items() if subject.heads and _is_projection(name, m)}
    pruner = _timed(
        row,
        "init",
        lambda: torch_pruning.pruner.BasePruner(
            subject.model,
            subject.inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[modules[name] for name in subject.ignored],
            num_heads=heads,
        ),
    )
    _timed(row, "step", pruner.step)
    row["total"] = row["init"] + row["step"]
    row["parameters"] = parameter_count(subject.model)
    return row


def _is_projection(name: str, module: nn.Module) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    names = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")
    return isinstance(module, nn.Linear) and leaf in names


def _timed(row: dict[str, float], part: str, run: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = run()
    row[part] = time.process_time() - start
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark on the chosen architectures and print one line each."""
    parser = argparse.ArgumentParser(prog="graphwright bench depgraph", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"architectures: {', '.join(ARCHITECTURES)}; all without")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"unknown architecture {unknown[0]!r}; known: {', '.join(ARCHITECTURES)}")
    torch.set_num_threads(1)
    # What the first capture and the first pruner of a process import is not what is compared.
    ours(_warm())
    theirs(_warm())
    rows = {}
    print(f"{'model':14}{'nodes':>6}{'capture':>9}{'analysis':>10}{'removal':>9}{'ours':>8}{'theirs':>8}{'ratio':>7}")
    for name in options.names or ARCHITECTURES:
        a, b = ours(ARCHITECTURES[name]()), theirs(ARCHITECTURES[name]())
        rows[name] = {"ours": a, "theirs": b}
        analysis = a["analysis"] + a["groups"]
        print(
            f"{name:14}{a['nodes']:6.0f}{a['capture']:9.2f}{analysis:10.3f}{a['removal']:9.2f}{a['total']:8.2f}"
            f"{b['total']:8.2f}{a['total'] / b['total']:7.2f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


def _warm() -> Subject:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    return Subject(model, {"input": torch.randn(2, 3, 8, 8)}, 0, ("2",))


if __name__ == "__main__":
    sys.exit(main())
