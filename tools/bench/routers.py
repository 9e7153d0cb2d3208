"""``graphwright bench routers FILE...``: what published or own routers of Learning-to-Cache remove, and what that saves.

A file is one that was published with the paper (``DDIM50_router.pt``, ``dpm20_router.pth``), or one that `LayerRouter.save`
wrote. ``--macs`` builds DiT-XL/2 at 256 pixels on the meta device, makes the plan of each router of 56 branches, and counts
the multiply-accumulates of its programs over a run. As in the paper's tables linear layers and convolutions count, products of
activations do not, for one sample without guidance; guidance evaluates two.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...frontends.capture import capture
from ...graph.cost import cost
from ...graph.errors import ArtifactError
from ...graph.program import Program
from ...graph.schedules import REFRESH
from ...passes.base import Pipeline
from ...passes.layer_router import LayerRouter
from ...passes.router_files import import_router
from ..run_dir import write_atomic

DIT_XL_2: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a run for one sample: of the full model, and with the router."""

    full: int
    routed: int


def open_router(file: Path) -> LayerRouter:
    """Return a router of any form.

    Raises:
        ArtifactError: The file holds none.
    """
    return LayerRouter.load(file) if file.suffix == ".safetensors" else import_router(file)


def dit(**changes: Any) -> Program:
    """Return DiT-XL/2 for one picture of 256 pixels on the meta device, or one that differs in some of its settings."""
    config = {**DIT_XL_2, **changes}
    with torch.device("meta"):
        model = import_module("diffusers").DiTTransformer2DModel(**config)
        size = config["sample_size"]
        inputs: dict[str, Tensor] = {
            "hidden_states": torch.empty(1, config["in_channels"], size, size),
            "timestep": torch.empty(1, dtype=torch.long),
            "class_labels": torch.empty(1, dtype=torch.long),
        }
    return capture(model, (), inputs, dynamic={})


def macs(program: Program, router: LayerRouter, threshold: float | None = None) -> Macs:
    """Count the weight layers of the programs that run at each evaluation.

    Raises:
        PreconditionError: The router is for another model.
    """
    plan = Pipeline([router.layer_cache(threshold)])(program).plan
    one = {name: cost(stage.program).macs for name, stage in plan.stages.items()}
    ran = plan.schedule.programs(router.evaluations)
    return Macs(one[REFRESH] * len(ran), sum(one[name] for name in ran))


def row(router: LayerRouter, threshold: float, program: Program | None) -> dict[str, Any]:
    """Return what a router does at a threshold."""
    removed = router.removed(threshold)
    reuse = router.reuse(threshold)
    total = sum(removed.values())
    out: dict[str, Any] = {
        "threshold": threshold,
        "evaluations": router.evaluations,
        "removed": total,
        "of": router.logits.numel(),
        "share": total / router.logits.numel(),
        **{kind: n / (router.kinds.count(kind) * len(router.cheap)) for kind, n in removed.items()},
        "of_all_evaluations": total / (router.evaluations * len(router.kinds)),
        "patterns": len(router.patterns(threshold)),
        "cheap": len(router.cheap),
        "removed_by_evaluation": {i: len(reuse[i]) for i in router.cheap},
    }
    if program is not None:
        counted = macs(program, router, threshold)
        out |= {"macs": counted.routed, "macs_full": counted.full}
    return out


def line(name: str, found: dict[str, Any]) -> str:
    """Return a row as text."""
    kinds = "".join(f"{found.get(kind, 0):>11.2%}" for kind in ("attention", "mlp"))
    counted = f"{found['macs_full'] / 1e12:>9.2f}{found['macs'] / 1e12:>9.2f}" if "macs" in found else ""
    return (
        f"{name:24}{found['threshold']:>6.2f}{found['removed']:>8}{'/' + str(found['of']):6}{found['share']:>8.2%}{kinds}"
        f"{found['of_all_evaluations']:>9.2%}{found['patterns']:>6} of {found['cheap']:<4}{counted}"
    )


def bench(files: Sequence[Path], thresholds: Sequence[float], count: bool, steps: bool, out: Path | None) -> None:
    """Print a row a router and threshold; write all to ``out`` as JSON."""
    program = dit() if count else None
    rows: dict[str, list[dict[str, Any]]] = {}
    head = f"{'router':24}{'theta':>6}{'removed':>8}{'':6}{'share':>8}{'attention':>11}{'mlp':>11}{'of all':>9}{'patterns':>12}"
    print(head + (f"{'full, T':>10}{'T MACs':>9}" if count else ""), flush=True)
    for file in files:
        router = open_router(file)
        fits = program if len(router.kinds) == 2 * DIT_XL_2["num_layers"] else None
        rows[file.name] = [row(router, t, fits) for t in thresholds or (router.threshold,)]
        for found in rows[file.name]:
            print(line(file.name, found), flush=True)
            if steps:
                print(
                    "  taken at each cheap evaluation: " + " ".join(map(str, found["removed_by_evaluation"].values()))
                )
    if out is not None:
        write_atomic(out, json.dumps(rows, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Describe the routers in files."""
    parser = argparse.ArgumentParser(prog="graphwright bench routers", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="published router files, or routers that were saved")
    parser.add_argument("--threshold", type=float, action="append", default=[], help="again for several; else its own")
    parser.add_argument("--macs", action="store_true", help="count a run of DiT-XL/2 (a minute)")
    parser.add_argument("--steps", action="store_true", help="print what each cheap evaluation takes")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(argv)
    if wrong := [t for t in options.threshold if not 0 < t < 1]:
        parser.error(f"--threshold must lie between 0 and 1, got {wrong[0]}")
    try:
        bench(options.files, options.threshold, options.macs, options.steps, options.json)
    except ArtifactError as err:
        parser.error(str(err))
    return 0


if __name__ == "__main__":
    sys.exit(main())
