"""``graphwright bench diff-pruning``: criteria for a diffusion model's channels, before and after equal fine-tuning.

    graphwright bench diff-pruning [--seeds 3] [--out FILE] [--json]

`builtin:digits-ddpm` loses 30 % of the channels of every group and of the dimensions of its heads, rounded as in
Diff-Pruning (arXiv 2305.10924), so that all contenders have equal widths; then each is trained for 200 steps of 32 digits.
Gradients are taken at every 8th timestep, of one batch of 32 digits with one noise; a seed is of these, of random scores and
of the fine-tuning. Judged by the denoising loss on held-out digits (mean of four draws of noise), and by 256 pictures of 25
steps from the same noise: their Frechet distance to the real digits, and their mean structural similarity (SSIM) to the
pictures of the dense model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...frontends.builtin import digits_images, load_builtin
from ...frontends.capture import capture
from ...graph.cost import cost
from ...graph.program import Program
from ...passes.base import Context, Pipeline
from ...passes.remove_channels import RemoveChannels
from ...passes.train_weights import TrainWeights
from .. import render
from ..digits import denoising_loss, digits_frechet, timesteps, training
from ..digits_sampler import denoiser, sample_digits
from ..facts import machine
from ..similarity import structural_similarity
from .cache_rows import Row, Rows

RATIO, SEEDS = 0.3, 3
BATCH, STRIDE = 32, 8
PICTURES, STEPS = 256, 25
FINE_TUNING = {"steps": 200, "learning_rate": 2e-4, "optimizer": "adam", "average": 0.99}
COLUMNS = ("loss", "frechet", "ssim")


@dataclass(frozen=True)
class Contender:
    """How channels are scored.

    Attributes:
        name: In the table.
        options: Of the removal.
        at: Calibrate at this timestep alone; None at all of them.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    at: int | None = None


CONTENDERS = (
    Contender("random", {"criterion": "random"}),
    Contender("magnitude (L2)", {"criterion": "magnitude-l2"}),
    Contender("Taylor at t = 48", {"criterion": "taylor"}, 48),
    Contender("Taylor at t = 496", {"criterion": "taylor"}, 496),
    Contender("Taylor, multivariable, all t", {"criterion": "taylor-multivariable"}),
    Contender("Diff-Pruning, all t", {"criterion": "taylor"}),
    Contender("Diff-Pruning, threshold 0.02", {"criterion": "taylor", "loss_threshold": 0.02}),
    Contender("Diff-Pruning, threshold 0.05", {"criterion": "taylor", "loss_threshold": 0.05}),
    Contender("Diff-Pruning, threshold 0.1", {"criterion": "taylor", "loss_threshold": 0.1}),
    Contender("Diff-Pruning, squared, threshold 0.05", {"criterion": "taylor-squared", "loss_threshold": 0.05}),
)


@dataclass
class Bench:
    """The dense model and what everything is compared with."""

    program: Program
    held_out: Tensor
    pictures: Tensor

    @classmethod
    def load(cls) -> Bench:
        """Capture the model and let it draw."""
        model, args, kwargs = load_builtin("digits-ddpm")
        program = capture(model, args, kwargs)
        return cls(program, digits_images()[1], _pictures(program))

    @torch.no_grad()
    def judged(self, program: Program) -> Row:
        """Return loss, Frechet distance and similarity."""
        losses = [float(denoising_loss(program, self.held_out, seed)) for seed in range(4)]
        drawn = _pictures(program)
        return {
            "loss": round(statistics.mean(losses), 5),
            "frechet": round(digits_frechet(drawn), 3),
            "ssim": round(float(structural_similarity(drawn, self.pictures).mean()), 4),
        }

    def row(self, contender: Contender, seed: int) -> Row:
        """Remove, judge, fine-tune and judge again."""
        loss, batches = timesteps(BATCH, STRIDE, seed)
        if contender.at is not None:
            batches = batches[contender.at // STRIDE : contender.at // STRIDE + 1]
        options = {"ratio": RATIO, "head_dim_ratio": RATIO, "rounding": "floor-removed", "seed": seed}
        removal = RemoveChannels(**options, **contender.options)
        done = Pipeline([removal])(self.program, Context(loss=loss, batches=batches))
        stats = done.records[0].result.stats
        loss, digits = training(BATCH)
        tuned = Pipeline([TrainWeights(**FINE_TUNING, seed=seed)])(  # pyright: ignore[reportArgumentType]
            done.program, Context(loss=loss, training=digits)
        ).program
        return {
            "contender": contender.name,
            "seed": seed,
            "mac_ratio": round(cost(tuned).total_macs / cost(self.program).total_macs, 4),
            "timesteps": int(stats.get("calibration_samples_used", 0)),
            "before": self.judged(done.program),
            "after": self.judged(tuned),
        }


def _pictures(program: Program) -> Tensor:
    return sample_digits(denoiser(program), PICTURES, STEPS)


def run(seeds: int, rows: Rows) -> Iterator[Row]:
    """Yield the dense model's row, then one for every contender and seed."""
    made: list[Bench] = []

    def bench() -> Bench:
        if not made:
            made.append(Bench.load())
        return made[0]

    yield from rows.unit("dense", "dense", lambda: [{"contender": "dense", "before": bench().judged(bench().program)}])
    for seed in range(seeds):
        for contender in CONTENDERS:
            make: Callable[[], list[Row]] = lambda c=contender, s=seed: [bench().row(c, s)]  # noqa: E731
            yield from rows.unit("pruned", f"seed {seed}, {contender.name}", make)


def summary(rows: Sequence[Row]) -> list[list[Any]]:
    """Return the lines of the table: mean and standard deviation over the seeds."""
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        found = [row for row in rows if row["contender"] == name]
        used = sorted({row["timesteps"] for row in found if "timesteps" in row})
        line: list[Any] = [
            name,
            "-".join(str(n) for n in dict.fromkeys((used[0], used[-1]))) if used and used[-1] else "",
        ]
        for when in ("before", "after"):
            for column in COLUMNS:
                line.append(_spread([row[when][column] for row in found if when in row], 4 if column == "loss" else 2))
        lines.append(line)
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="graphwright bench diff-pruning", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, help="file of rows; a run that was stopped goes on from it")
    parser.add_argument("--json", action="store_true", help="one object a row instead of a table")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = []
    for row in run(options.seeds, Rows(options.out, machine())):
        found.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    if not options.json:
        columns = [f"{when} {column}" for when in ("removed:", "tuned:") for column in COLUMNS]
        render.print_table("digits-ddpm, 30 % of the channels", ["scored by", "timesteps", *columns], summary(found))
    return 0
