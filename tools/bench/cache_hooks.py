"""``graphwright bench cache hooks``: pictures of digits by our caches, those of diffusers, and fewer steps, at what they cost.

Every run begins with the same noise. Its cost is counted as it runs; its error is the distance of its pictures from those
of the uncached run, and the Frechet distance is that to real digits.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...graph.errors import first_line
from .cache_bed import Bed
from .cache_contenders import Contender, fewer_steps, ours
from .cache_diffusers import Refused, theirs
from .cache_rows import Row, Rows

MODELS = ("digits-ddpm", "digits-dit")
UNCACHED, BASELINE = "uncached", "fewer steps"
OURS, PEER = ("graphwright",), "diffusers"
CACHES = (*OURS, PEER)
METRICS = {"error": "steps_error", "frechet": "steps_frechet"}


def measure(bed: Bed, contender: Contender) -> list[Row]:
    """Draw with one contender; what a peer raises is a row as well."""
    row: Row = {"who": contender.who, "method": contender.method, "setting": contender.setting}
    try:
        drawn = bed.draw(contender.make(), contender.steps)
    except Exception as err:
        if contender.who != PEER:
            raise
        kind = "" if isinstance(err, Refused) else f"{type(err).__name__}: "
        return [row | {"note": kind + first_line(err)}]
    cost = {"mac_ratio": drawn.macs / bed.uncached.macs, "giga_macs": drawn.macs / 1e9}
    return [row | cost | {"error": drawn.error(bed.uncached), "frechet": drawn.frechet, "note": ""}]


def reference(bed: Bed) -> list[Row]:
    """Return the uncached run, and another with other noise that says how much a Frechet distance varies by chance."""
    other = bed.draw(bed.module, seed=1)
    row: Row = {"who": UNCACHED, "method": "DDIM", "mac_ratio": 1.0}
    first = row | {"setting": f"{bed.steps} steps", "frechet": bed.uncached.frechet, "note": ""}
    first["giga_macs"] = bed.uncached.macs / 1e9
    return [first, row | {"setting": "other noise", "frechet": other.frechet, "note": "what chance makes of it"}]


def bench(rows: Rows, name: str, steps: int, count: int, only: str = "") -> list[Row]:
    """Measure everything on one denoiser; rows have what fewer steps give at the same cost beside them.

    Args:
        rows: Of earlier runs.
        name: Of the denoiser.
        steps: Of the uncached run.
        count: Pictures of a run.
        only: Leave out caches whose method and setting do not contain this.
    """
    part, key = "hooks", f"{name}, {steps} steps, {count} pictures"
    bed = Bed(name, steps, count)
    found = list(rows.unit(part, f"{key}, uncached", lambda: reference(bed)))
    caches = [contender for contender in (*ours(bed), *theirs(bed)) if only in contender.key]
    for contender in (*fewer_steps(bed), *caches):
        found += rows.unit(part, f"{key}, {contender.key}", lambda c=contender: measure(bed, c))
    return _merged(beside_fewer_steps(found))


def beside_fewer_steps(rows: Sequence[Row]) -> list[Row]:
    """Add to every cache what fewer steps give at its cost, interpolated between the two nearest numbers of steps."""
    plain = sorted((r for r in rows if r["who"] == BASELINE), key=lambda r: r["mac_ratio"])
    full = next(r for r in rows if r["who"] == UNCACHED)
    plain.append({"mac_ratio": 1.0, "error": 0.0, "frechet": full["frechet"]})
    out = []
    for row in rows:
        added = {}
        if row["who"] in CACHES and "mac_ratio" in row and row["mac_ratio"] >= plain[0]["mac_ratio"]:
            added = {column: _between(plain, row["mac_ratio"], metric) for metric, column in METRICS.items()}
        out.append(row | added)
    return out


def _between(plain: Sequence[Row], ratio: float, metric: str) -> float:
    for low, high in zip(plain, plain[1:], strict=False):
        if ratio <= high["mac_ratio"]:
            share = (ratio - low["mac_ratio"]) / (high["mac_ratio"] - low["mac_ratio"])
            return low[metric] + share * (high[metric] - low[metric])
    return plain[-1][metric]


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Let a method that refuses at every setting alike be one row."""
    refusals: dict[tuple[str, str], Row] = {}
    out = []
    for row in rows:
        if "mac_ratio" in row:
            out.append(row)
            continue
        first = refusals.setdefault((row["method"], row["note"]), dict(row))
        if first["setting"] != row["setting"]:
            first["setting"] = "every setting"
    return [*out, *refusals.values()]


def verdict(rows: Sequence[Row]) -> list[str]:
    """Return sentences that say who wins: against fewer steps, and against the caches of diffusers, at the cost spent."""
    lines = []
    for metric, column in METRICS.items():
        for who in CACHES:
            caches = [r for r in rows if r["who"] == who and column in r]
            better = sum(r[metric] < r[column] for r in caches)
            if caches:
                lines.append(
                    f"{metric}: {who} beats fewer steps of the same cost in {better} of {len(caches)} settings"
                )
        for side in OURS:
            lines += [_duel(rows, metric, side, PEER), _duel(rows, metric, PEER, side)]
    return [line for line in lines if line]


def _duel(rows: Sequence[Row], metric: str, who: str, other: str) -> str:
    """Say for how many settings of one side the other has one that costs no more and is no worse."""
    mine, theirs = ([r for r in rows if r["who"] == side and "mac_ratio" in r] for side in (who, other))
    if not mine or not theirs:
        return ""
    met = sum(any(o["mac_ratio"] <= r["mac_ratio"] and o[metric] <= r[metric] for o in theirs) for r in mine)
    return f"{metric}: {other} has one as cheap and as good for {met} of {len(mine)} settings of {who}"
