"""``graphwright bench cache [PART...]``: caches of diffusion models beside what others publish and ship.

``macs`` counts the published tables of DeepCache from configurations. ``deepcache`` runs beside the package DeepCache: time,
memory and equality on the U-Net of Stable Diffusion 1.5, and calls that the package gets wrong. ``hooks`` draws digits with
our caches, with those of diffusers and with fewer steps, and compares the pictures at the cost that was really spent. ``onnx``
samples with exported plans in ONNX Runtime. ``gpu`` times a whole run on a GPU, and says "not measured" where there is none.
Rows are written to the file of ``--json`` as they come; a rerun with the same file goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..render import print_lines, print_table
from . import cache_cases, cache_deepcache, cache_gpu, cache_hooks, cache_macs, cache_models, cache_onnx
from .cache_rows import Row, Rows, cheapest_first, front
from .timing import environment, one_thread, sentence

BRANCHES = (0, 1, 2, 3, 11)
PARTS = ("macs", "deepcache", "hooks", "onnx", "gpu")

Column = tuple[str, Callable[[Row], str]]


def _number(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row[name], form) if row.get(name) is not None else ""


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, ""))


def _holds(name: str) -> Callable[[Row], str]:
    return lambda row: {True: "yes", False: "no", None: ""}[row.get(name)]


MACS: tuple[Column, ...] = (
    ("model", _text("model")),
    ("what", _text("what")),
    ("source", _text("source")),
    ("published", _text("published")),
    ("ours", _number("ours", ".4g")),
    ("unit", _text("unit")),
    ("ratio", _number("ratio", ".4f")),
    ("holds", _holds("holds")),
    ("note", _text("note")),
)
SIDE_BY_SIDE: tuple[Column, ...] = (
    ("branch", _text("branch")),
    ("N", _text("interval")),
    ("max difference", _number("max_difference", ".2g")),
    ("ours s", _number("ours_s", ".1f")),
    ("theirs s", _number("theirs_s", ".1f")),
    ("ours / theirs", lambda row: f"{row['ours_s'] / row['theirs_s']:.3f}"),
    ("speed-up", _number("speedup", ".2f")),
    ("theirs", _number("their_speedup", ".2f")),
    ("by MACs", _number("bound", ".2f")),
    ("reuse s", _number("reuse_s", ".3f")),
    ("theirs", _number("their_reuse_s", ".3f")),
    ("time ratio", _number("time_ratio", ".3f")),
    ("theirs", _number("their_time_ratio", ".3f")),
    ("MAC ratio", _number("mac_ratio", ".3f")),
    ("in time", _holds("in_time")),
    ("kept MB", _number("kept_mb", ".1f")),
    ("theirs", _number("their_kept_mb", ".1f")),
    ("peak MB", _number("peak_mb", ".0f")),
    ("theirs", _number("their_peak_mb", ".0f")),
    ("PSNR dB", _number("psnr", ".1f")),
)
ATTENTION: tuple[Column, ...] = (
    ("N", _text("interval")),
    ("s", _number("seconds", ".1f")),
    ("speed-up", _number("speedup", ".2f")),
    ("by MACs", _number("bound", ".2f")),
    ("PSNR dB", _number("psnr", ".1f")),
)
CASES: tuple[Column, ...] = (("case", _text("case")), ("theirs", _text("theirs")), ("ours", _text("ours")))
HOOKS: tuple[Column, ...] = (
    ("MAC ratio", _number("mac_ratio", ".3f")),
    ("who", _text("who")),
    ("method", _text("method")),
    ("setting", _text("setting")),
    ("error", _number("error", ".4f")),
    ("", _text("error_front")),
    ("Frechet", _number("frechet", ".2f")),
    ("", _text("frechet_front")),
    ("fewer steps", _number("steps_error", ".4f")),
    ("note", _text("note")),
)
ONNX: tuple[Column, ...] = (
    ("model", _text("model")),
    ("setting", _text("setting")),
    ("difference", _number("max_difference", ".2g")),
    ("uncached s", _number("full_s", ".2f")),
    ("ours s", _number("ours_s", ".2f")),
    ("speed-up", _number("speedup", ".2f")),
    ("by MACs", _number("bound", ".2f")),
    ("share", _number("share", ".2f")),
    ("in time", _holds("in_time")),
)
GPU: tuple[Column, ...] = (
    ("what", _text("what")),
    ("uncached s", _number("full_s", ".2f")),
    ("ours s", _number("ours_s", ".2f")),
    ("speed-up", _number("speedup", ".2f")),
    ("at least", _number("target", ".1f")),
    ("by MACs", _number("bound", ".2f")),
    ("PSNR dB", _number("psnr", ".1f")),
    ("holds", _holds("holds")),
    ("note", _text("note")),
)


def show(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print rows as a table; columns of numbers are those whose header is one of a number."""
    right = [i for i, (header, _) in enumerate(columns) if header not in WORDS]
    print_table(title, [header for header, _ in columns], [[cell(row) for _, cell in columns] for row in rows], right)


WORDS = frozenset(
    {
        "model",
        "what",
        "source",
        "unit",
        "note",
        "case",
        "who",
        "method",
        "setting",
        "ours",
        "theirs",
        "in time",
        "holds",
    }
)


def macs(rows: Rows, options: argparse.Namespace) -> int:
    """Print the published tables beside ours; return how many rows neither hold nor are explained."""
    found = [
        row
        for subject in cache_macs.SUBJECTS
        for row in rows.unit("macs", subject.name, lambda subject=subject: cache_macs.rows_of(subject))
    ]
    show("multiply-accumulates of linear layers and convolutions, mean of a run's evaluations", MACS, found)
    return sum(row.get("holds") is False and not row["note"] for row in found)


def deepcache(rows: Rows, options: argparse.Namespace) -> int:
    """Print the comparison with the package, and its cases; return how many pictures differ."""
    config = cache_models.SD_QUARTER if options.quarter else cache_models.SD_15
    bed = cache_deepcache.SideBySide(config, options.latent)
    found = cache_deepcache.bench(rows, bed, options.branches, options.intervals)
    width = " at a quarter of its widths" if options.quarter else ""
    title = f"U-Net of Stable Diffusion 1.5{width}, latents {options.latent}x{options.latent}, {bed.steps} steps with guidance"
    show(f"{title}, CPU seconds of one thread", SIDE_BY_SIDE, found)
    show(
        "the same with PyramidAttentionBroadcast of diffusers",
        ATTENTION,
        cache_deepcache.attention(rows, bed, options.intervals),
    )
    cases = [
        row
        for name in cache_cases.CASES
        for row in rows.unit("cases", name, lambda name=name: cache_cases.rows_of(name))
    ]
    show("calls that the package gets wrong; F is a full evaluation, - a reuse", CASES, cases)
    return sum(not row["equal"] for row in found)


def hooks(rows: Rows, options: argparse.Namespace) -> int:
    """Print what caches cost and how far they lead from the uncached pictures, one table a model."""
    for name in options.models:
        found = cache_hooks.bench(rows, name, options.steps, options.count, options.only)
        found = cheapest_first(found)
        for column in ("error", "frechet"):
            for i in front(found, column):
                found[i][f"{column}_front"] = "*"
        show(
            f"{name}, {options.steps} steps, {options.count} pictures; * nothing else is as cheap and as good",
            HOOKS,
            found,
        )
        print_lines(*cache_hooks.verdict(found))
    return 0


def onnx(rows: Rows, options: argparse.Namespace) -> int:
    """Print plans in ONNX Runtime; return how many differ from the plan in PyTorch."""
    found = cache_onnx.bench(rows)
    show("whole sampling runs in ONNX Runtime on one thread, CPU seconds", ONNX, found)
    return sum(not row["equal"] for row in found)


def gpu(rows: Rows, options: argparse.Namespace) -> int:
    """Print a whole run on a GPU, or that it was not measured; return whether it is too slow."""
    found = cache_gpu.bench(rows)
    show("whole sampling runs on a GPU, seconds", GPU, found)
    return sum(row.get("holds") is False for row in found)


def _branches(text: str) -> tuple[int, ...]:
    return tuple(range(12)) if text == "all" else tuple(int(part) for part in text.split(","))


RUN = {"macs": macs, "deepcache": deepcache, "hooks": hooks, "onnx": onnx, "gpu": gpu}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graphwright bench cache", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all without")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and take from it what it has")
    parser.add_argument("--latent", type=int, default=32, help="deepcache: side of the latents; 64 is 512 pixels")
    parser.add_argument(
        "--quarter", action="store_true", help="deepcache: a quarter of the widths, for a tenth of the time"
    )
    parser.add_argument(
        "--branches", type=_branches, default=BRANCHES, help="deepcache: such as 0,1,2 or all; %(default)s"
    )
    parser.add_argument("--intervals", type=int, nargs="+", default=(3, 5), help="deepcache: a full evaluation every N")
    parser.add_argument("--models", nargs="+", default=cache_hooks.MODELS, help="hooks: builtin denoisers of digits")
    parser.add_argument("--steps", type=int, default=50, help="hooks: of the uncached run")
    parser.add_argument("--count", type=int, default=500, help="hooks: pictures of every run")
    parser.add_argument("--only", default="", help="hooks: caches whose name has this in it, such as LearnLayerCache")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts; the exit code is 1 where a count or a picture is not what it should be."""
    parser = _parser()
    options = parser.parse_args(argv)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if min(*options.intervals, options.steps, options.count) < 2 or options.latent < 8 or options.latent % 8:
        parser.error("--intervals, --steps and --count must be at least 2, --latent a multiple of 8")
    if not all(0 <= branch < 12 for branch in options.branches):
        parser.error(f"--branches must be within 0 to 11, got {options.branches}")
    wrong = 0
    with one_thread(), torch.random.fork_rng(devices=[]):
        about = environment("diffusers", "DeepCache")
        print_lines(sentence(about))
        rows = Rows(options.json, about)
        for part in options.parts or PARTS:
            wrong += RUN[part](rows, options)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
