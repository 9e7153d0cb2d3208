"""``graphwright bench learned-routers``: a router that learned on ``builtin:digits-dit``, beside others of its size.

    graphwright bench learned-routers [--seeds 5] [--steps 20] [--price 0.01] [--out FILE] [--json]

DDIM runs with guidance 2; every second evaluation may reuse any of 12 branches. A router learns in 100 rounds of 8 digits
(Learning-to-Cache, arXiv 2406.01733), at a price that says how many branches it keeps; the others reuse as many branches: those
whose gates 80 rounds with the pictures for objective close furthest, those that change least, spread evenly over evaluations and
network ("uniform"), from its top or its bottom, or at random. A seed is of the training, of the random choice and of the noise.

*Error* is the mean squared difference of a cheap evaluation from the full model's in runs of other noise; *pictures* the root
mean squared difference of 512 digits from those of the model without a cache; with their Frechet distance to the real digits.
The last columns say in how many seeds the learned router is better by each of the three, and the one that learned from pictures
by the last two.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from ...passes.base import Pipeline
from ...passes.layer_router import LayerRouter
from ...passes.router_baselines import (
    bottom_up,
    branch_changes,
    by_change,
    evenly_spread,
    random_router,
    router_errors,
    top_down,
)
from ...passes.train_layer_router import train_layer_router
from .. import render
from ..digits_labels import sampling
from ..facts import machine
from .cache_bed import GUIDANCE, Bed, Drawn
from .cache_rows import Row, Rows

# Random routers whose error is measured, and how many of them draw pictures.
SEEDS, RANDOM, DRAWN = 5, 20, 3
STEPS, PICTURES, PRICE = 20, 512, 0.01
LEARNED, PICTURED = "learned", "learned from pictures"
METRICS = ("error", "pictures", "frechet")
ROUNDS, PICTURE_ROUNDS, DIGITS, RATE, THRESHOLD = 100, 80, 8, 0.1, 0.1
# What the last columns compare: whose, and by what.
WINS = (*((LEARNED, metric) for metric in METRICS), *((PICTURED, metric) for metric in METRICS[1:]))


def seed_rows(bed: Bed, seed: int, price: float = PRICE) -> list[Row]:
    """Return one row for each router of a seed, and one for the model without a cache."""
    program, sample = bed.program, sampling(DIGITS, bed.steps, GUIDANCE)
    train = partial(
        train_layer_router, program, sample, evaluations=bed.steps, lr=RATE, seed=seed, lam_of_all_reused=price
    )
    learned = train(rounds=ROUNDS, threshold=THRESHOLD)
    pictured = train(rounds=PICTURE_ROUNDS, objective="picture")
    removed = sum(learned.removed().values())
    changes = branch_changes(program, sample, learned, seed=1000 + seed)
    drawn = [random_router(learned, removed, RANDOM * seed + i) for i in range(RANDOM)]
    routers = {
        LEARNED: learned,
        PICTURED: by_change(learned, pictured.logits, removed),
        "least change": by_change(learned, changes, removed),
        "uniform": evenly_spread(learned, removed),
        "top-down": top_down(learned, removed),
        "bottom-up": bottom_up(learned, removed),
    }
    errors = router_errors(program, sample, [*routers.values(), *drawn], seed=2000 + seed)
    random_errors = errors[len(routers) :]
    uncached = bed.draw(bed.module, seed=seed)
    rows: list[Row] = [{"router": "no cache", "seed": seed, "frechet": round(uncached.frechet, 4)}]
    for (name, router), error in zip(routers.items(), errors, strict=False):
        rows.append(_drawn(bed, router, uncached, seed) | {"router": name, "error": error})
    found = [_drawn(bed, router, uncached, seed) for router in drawn[:DRAWN]]
    mean = {column: statistics.mean(row[column] for row in found) for column in ("mac_ratio", "pictures", "frechet")}
    rows.append(found[0] | mean | {"router": "random, mean", "error": statistics.mean(random_errors)})
    return [
        *rows,
        {"router": f"random, best of {RANDOM}", "seed": seed, "removed": removed, "error": min(random_errors)},
    ]


def _drawn(bed: Bed, router: LayerRouter, uncached: Drawn, seed: int) -> Row:
    pictures = bed.draw(_module(bed, router), seed=seed)
    return {
        "seed": seed,
        "removed": sum(router.removed().values()),
        "of": router.logits.numel(),
        "mac_ratio": round(pictures.macs / uncached.macs, 4),
        "pictures": round(pictures.error(uncached), 5),
        "frechet": round(pictures.frechet, 4),
    }


def _module(bed: Bed, router: LayerRouter) -> torch.nn.Module:
    return Pipeline([router.layer_cache()])(bed.program).plan.module()


def run(seeds: int, rows: Rows, steps: int = STEPS, price: float = PRICE) -> Iterator[Row]:
    """Yield the rows of every seed."""
    bed = Bed("digits-dit", steps, PICTURES)
    for seed in range(seeds):
        at = f"{steps} steps, price {price}, seed {seed}"
        yield from rows.unit("digits-dit", at, lambda seed=seed: seed_rows(bed, seed, price))


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """Return the lines of the table: means and standard deviations over the seeds; of errors the range; seeds won."""
    lines = []
    judged = {name: {row["seed"]: row for row in rows if row["router"] == name} for name in (LEARNED, PICTURED)}
    for name in dict.fromkeys(row["router"] for row in rows):
        found = [row for row in rows if row["router"] == name]
        errors = [row["error"] for row in found if "error" in row]
        line = [name]
        for column, form in (("removed", "{:.0f}"), ("mac_ratio", "{:.3f}")):
            line.append(_spread([row[column] for row in found if column in row], form))
        line.append(f"{min(errors):.1e} to {max(errors):.1e}" if errors else "")
        for column, form in (("pictures", "{:.4f}"), ("frechet", "{:.3f}")):
            line.append(_spread([row[column] for row in found if column in row], form))
        for whose, column in WINS:
            seeds = judged[whose]
            pairs = [
                (seeds[row["seed"]][column], row[column]) for row in found if column in row and row["seed"] in seeds
            ]
            shown = pairs and name != whose and "removed" in found[0]
            line.append(f"{sum(mine < other for mine, other in pairs)} of {len(pairs)}" if shown else "")
        lines.append(line)
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="graphwright bench learned-routers", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler")
    parser.add_argument("--price", type=float, default=PRICE, help="of a computed branch: lam_of_all_reused")
    parser.add_argument("--out", type=Path, help="file of rows; a run that was stopped goes on from it")
    parser.add_argument("--json", action="store_true", help="one object a row instead of a table")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = []
    for row in run(options.seeds, Rows(options.out, machine()), options.steps, options.price):
        found.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    if not options.json:
        headers = ["router", "reused", "MACs", "error", "pictures", "Frechet distance"]
        headers += [f"{whose} better by {column}" for whose, column in WINS]
        render.print_table(
            f"digits-dit, {options.steps} steps, price {options.price}, {PICTURES} pictures", headers, summary(found)
        )
    return 0
