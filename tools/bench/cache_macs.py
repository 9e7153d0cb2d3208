"""``graphwright bench cache macs``: the tables of multiply-accumulates of DeepCache, from configurations alone.

Every denoiser is built on the meta device, captured, and cut at the branch of the table. Linear layers and convolutions
count, products of activations do not, as in the published counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...frontends.capture import capture
from ...graph.cost import cost
from ...graph.program import Program
from ...graph.schedules import REFRESH, REUSE, Uniform
from ...passes.base import Pipeline
from ...passes.insert_feature_cache import InsertFeatureCache
from .cache_models import DDPM_CIFAR, DDPM_LSUN, LDM_4_G, SD_15, conditional, unconditional
from .cache_rows import Row

PAPER = "arXiv 2312.00858"
TOLERANCE = 0.005
HALF = 2  # bytes of a float16
NOTES = {
    ("DDPM CIFAR-10", "full"): "printed with two digits",
    ("DDPM CIFAR-10", "branch 6, N=5"): "2 % above the table, unexplained: all branches but 6 and 7 agree",
    ("DDPM CIFAR-10", "branch 7, N=5"): "2 % above the table, unexplained: all branches but 6 and 7 agree",
    ("SD 1.5", "branch 1, N=5"): "the printed figure is what N=4 costs, see the next row",
}


@dataclass(frozen=True)
class Figure:
    """A published figure: an average in 10^9 MACs of one evaluation.

    Attributes:
        table: Where it stands.
        branch: Cut; None for the denoiser as it is.
        interval: N.
        printed: As it is printed.
    """

    table: str
    branch: int | None
    interval: int
    printed: str


@dataclass(frozen=True)
class Subject:
    """A denoiser and what is published about it.

    Attributes:
        name: As in the paper.
        build: Makes it, on the meta device.
        sample: Channels and side of its input.
        context: Tokens and width of its text input, if it has one.
        evaluations: Of the published sampling run.
        figures: What is published.
        reused: Branches whose reuse program is compared with the package DeepCache.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, int]
    evaluations: int
    figures: tuple[Figure, ...]
    context: tuple[int, int] | None = None
    reused: tuple[int, ...] = field(default=())

    def inputs(self) -> tuple[Tensor, ...]:
        """Return example inputs of one sample on the meta device."""
        channels, side = self.sample
        inputs = torch.empty(1, channels, side, side, device="meta"), torch.empty(1, device="meta")
        return (*inputs, torch.empty(1, *self.context, device="meta")) if self.context else inputs


def _figures(table: str, branch: int, full: str, **averages: str) -> tuple[Figure, ...]:
    """Return the figures of one line; ``averages`` are named ``N2``, ``N3``, ..."""
    lines = [Figure(table, branch, int(name[1:]), printed) for name, printed in averages.items()]
    return Figure(table, None, 1, full), *lines


_CIFAR_BRANCHES = ("1.60", "2.24", "3.01", "3.89", "4.58", "5.31", "5.45", "5.60", "5.88", "5.95", "5.99", "6.03")
SUBJECTS: tuple[Subject, ...] = (
    Subject(
        "LDM-4-G",
        lambda: conditional(LDM_4_G),
        (3, 64),
        250,
        _figures("table 1", 0, "99.82", N2="52.12", N3="36.48", N5="23.50", N10="13.97", N20="9.39"),
        context=(1, 512),
    ),
    Subject(
        "DDPM CIFAR-10",
        lambda: unconditional(DDPM_CIFAR),
        (3, 32),
        100,
        (
            *_figures("table 2", 2, "6.1", N2="4.15", N3="3.54", N5="3.01", N10="2.63"),
            *(Figure("table 12", branch, 5, printed) for branch, printed in enumerate(_CIFAR_BRANCHES)),
        ),
    ),
    Subject(
        "DDPM LSUN-256",
        lambda: unconditional(DDPM_LSUN),
        (3, 256),
        100,
        _figures("table 2", 2, "248.7", N2="190.8", N3="172.3", N5="156.0"),
    ),
    Subject(
        "SD 1.5",
        lambda: conditional(SD_15),
        (4, 64),
        50,
        (*_figures("table 3", 1, "338.83", N5="130.45"), Figure("table 3, as N=4", 1, 4, "130.45")),
        context=(77, 768),
        reused=(0, 1, 2, 3),
    ),
)


def rows_of(subject: Subject) -> list[Row]:
    """Return the rows of one denoiser: published figures, and beside the package its reuse steps, nodes and register."""
    model, inputs = _on_meta(subject)
    program = capture(model, inputs, {"return_dict": False}, dynamic={})
    cuts = {f.branch: _cut(program, f.branch) for f in subject.figures if f.branch is not None}
    cuts |= {branch: _cut(program, branch) for branch in subject.reused}
    rows = [_published(subject, figure, program, cuts) for figure in subject.figures]
    for branch, counted in package_counts(model, inputs, subject.reused).items():
        found = cuts[branch]
        what = f"reuse, branch {branch}"
        rows.append(_row(subject, what, "DeepCache 0.1.1, counted as it runs", counted, found["reuse"], "G"))
        share = found["nodes_reuse"] / found["nodes"]
        row = _row(subject, f"{what}, nodes", "", None, found["nodes_reuse"], "nodes")
        rows.append(row | {"note": f"{share:.1%} of the {found['nodes']:.0f} nodes"})
        row = _row(subject, f"register, branch {branch}, float16", "", None, found["elements"] * HALF / 1e6, "MB")
        rows.append(row | {"note": "all that is kept between evaluations"})
    return rows


def _on_meta(subject: Subject) -> tuple[nn.Module, tuple[Tensor, ...]]:
    with torch.device("meta"):
        return subject.build(), subject.inputs()


def _cut(program: Program, branch: int) -> dict[str, float]:
    """Return what a cut costs: MACs of both programs in 10^9, nodes, and elements of the register."""
    result = Pipeline([InsertFeatureCache(branch=branch)])(program)
    stages, stats = result.plan.stages, result.records[0].result.stats
    register = stages[REUSE].program.example[-1]
    return {
        "full": cost(stages[REFRESH].program).macs / 1e9,
        "reuse": cost(stages[REUSE].program).macs / 1e9,
        "nodes": stats["nodes_refresh"],
        "nodes_reuse": stats["nodes_reuse"],
        "elements": register.numel(),
    }


def average(full: float, reuse: float, evaluations: int, interval: int) -> float:
    """Return the mean cost of an evaluation over a run with a full one every ``interval``."""
    names = Uniform(interval).programs(evaluations)
    return sum(full if name == REFRESH else reuse for name in names) / evaluations


def _published(subject: Subject, figure: Figure, program: Program, cuts: dict[int, dict[str, float]]) -> Row:
    if figure.branch is None:
        return _row(subject, "full", f"{PAPER}, {figure.table}", figure.printed, cost(program).macs / 1e9, "G")
    cut = cuts[figure.branch]
    ours = average(cut["full"], cut["reuse"], subject.evaluations, figure.interval)
    what = f"branch {figure.branch}, N={figure.interval}"
    return _row(subject, what, f"{PAPER}, {figure.table}", figure.printed, ours, "G")


def _row(subject: Subject, what: str, source: str, other: str | float | None, ours: float, unit: str) -> Row:
    """Return a row; it holds if the figures differ by half a percent, or by what the rounding of a printed one hides."""
    row: Row = {"model": subject.name, "what": what, "source": source, "ours": ours, "unit": unit}
    row["note"] = NOTES.get((subject.name, what), "")
    if other is None:
        return row
    value, printed = float(other), other if isinstance(other, str) else f"{other:.4g}"
    hidden = 0.5 * 10.0 ** -len(other.partition(".")[2]) if isinstance(other, str) else 0.0
    holds = abs(ours - value) <= max(TOLERANCE * value, hidden)
    return row | {"published": printed, "ratio": ours / value, "holds": holds}


def package_counts(model: nn.Module, inputs: Sequence[Any], branches: Sequence[int]) -> dict[int, float]:
    """Return 10^9 MACs of linear layers and convolutions that a skip step of the package DeepCache runs, by branch.

    Torch's own counter watches the package at work on the denoiser, which may be on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from .cache_helper import package

    pipe = SimpleNamespace(unet=model, scheduler=SimpleNamespace(timesteps=torch.tensor([900, 600, 300])))
    counted = {}
    for branch in branches:
        with package(pipe, interval=3, branch=branch), torch.no_grad():
            full, skip = pipe.scheduler.timesteps[:2]
            model(inputs[0], full, *inputs[2:], return_dict=False)
            with FlopCounterMode(display=False) as counter:
                model(inputs[0], skip, *inputs[2:], return_dict=False)
        by_operator = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
        counted[branch] = sum(by_operator.get(f"aten.{op}", 0) for op in ("addmm", "mm", "convolution")) / 2e9
    return counted
