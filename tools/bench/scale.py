"""``graphwright bench scale``: the analysis of chains of up to 50,000 nodes, and a Llama of 70 billion parameters.

Chains repeat a residual block of convolution and attention; the fit of CPU seconds against nodes says whether the
analysis is linear. The Llama is on the meta device, in a process of its own so that the peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...graph.errors import GraphwrightError
from ..run_dir import write_atomic
from .chains import analysis_seconds, chain, fit
from .timing import environment, one_thread, sentence

SIZES = (1_000, 5_000, 10_000, 20_000, 50_000)
LLAMA = "import json, torch; from {package}.llama import Llama, plan; torch.set_num_threads(1); print(json.dumps(plan(Llama())))"


def measure_chains(sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Analyse chains of about ``sizes`` nodes, printing each; return nodes, CPU seconds and the fit."""
    nodes, seconds = [], []
    print(f"{'nodes':>8}{'analysis':>10}")
    for size in sizes:
        program = chain(size)
        nodes.append(len(program.graph_module.graph.nodes))
        seconds.append(analysis_seconds(program, repeats))
        print(f"{nodes[-1]:8,}{seconds[-1]:10.3f}", flush=True)
    line = fit(nodes, seconds)
    print(f"{line.slope:.1f} microseconds a node, r2 {line.r2:.4f}, exponent of the power law {line.exponent:.3f}")
    return {"nodes": nodes, "seconds": seconds, "fit": asdict(line)}


def measure_llama() -> dict[str, Any]:
    """Plan removals on the Llama of 70 billion parameters in a fresh process, print what came out and return it."""
    command = [sys.executable, "-c", LLAMA.format(package=__package__)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise GraphwrightError(f"the process of the Llama ended with code {done.returncode}; its last words are above")
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"Llama, {found['config']['layers']} layers: {found['parameters']:,} parameters ({found['formula']:,} by formula), "
        f"{found['nodes']:,} nodes, {sum(n for *_, n in found['groups'])} groups"
    )
    print("  " + ", ".join(f"{n} {kind} {size}" for kind, size, n in found["groups"]))
    print(f"  capture {found['capture']:.2f}, analysis {found['analysis']:.3f}")
    for name, plan in found["plans"].items():
        print(
            f"  20 % of {name}: {plan['parameters']:,} parameters ({plan['formula']:,} by formula), "
            f"removal {plan['removal']:.2f}"
        )
    print(f"  peak memory {found['peak_gb']:.2f} GB")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run both parts; the exit code is 1 where a count differs from its formula."""
    parser = argparse.ArgumentParser(prog="graphwright bench scale", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="nodes of the chains")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is analysed; the median counts")
    parser.add_argument("--no-llama", action="store_true", help="the chains alone")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(argv)
    if options.repeats < 1 or len(options.sizes) < 2 or min(options.sizes) < 1:
        parser.error("--repeats must be at least 1, and --sizes at least two whole numbers from 1")
    with one_thread():
        about = environment("transformers")
        print(f"{sentence(about)}; median of {options.repeats}")
        data: dict[str, Any] = {"environment": about, "chains": measure_chains(options.sizes, options.repeats)}
    if not options.no_llama:
        data["llama"] = measure_llama()
    if options.json is not None:
        write_atomic(options.json, json.dumps(data, indent=1) + "\n")
    counts = [data["llama"], *data["llama"]["plans"].values()] if "llama" in data else []
    return int(any(found["parameters"] != found["formula"] for found in counts))


if __name__ == "__main__":
    sys.exit(main())
