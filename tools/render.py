"""What the command line prints: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .numbers import change, count

FROM_CACHE = "the graph is from the cache; --no-cache captures anew"
# Where nobody looks, as in a pipe, lines are as long as they need to be.
UNBOUNDED = 10_000


def console(stderr: bool = False) -> Console:
    """Return a console on the current standard stream. Colours follow the terminal and ``NO_COLOR``."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else UNBOUNDED, highlight=False, soft_wrap=True)


def print_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> None:
    """Print a table; columns in ``right`` are aligned to the right."""
    out = console()
    shown = Table(title=escape(title) or None, title_justify="left", box=None if not out.is_terminal else Table().box)
    for i, header in enumerate(headers):
        shown.add_column(header, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(str(cell)) for cell in row))
    out.print(shown)


def print_lines(*lines: str) -> None:
    """Print lines as they are."""
    out = console()
    for line in lines:
        out.print(line, markup=False)


def print_note(message: str) -> None:
    """Print a line beside the results, to standard error."""
    console(stderr=True).print(message, markup=False)


def print_error(message: str) -> None:
    """Print ``error: message`` to standard error."""
    console(stderr=True).print(f"[bold red]error:[/] {escape(message)}")


def print_groups(groups: Sequence[Mapping[str, Any]], members: bool) -> None:
    """Print coupling groups, one a line, or with every member below its group."""
    rows = []
    for group in groups:
        tensors = group["members"]
        rows.append([group["name"], group["kind"], group["size"], group["step"], group["exactness"], len(tensors)])
        if members:
            rows += [[f"  {m['name']} dim {m['dim']}", "", "", "", "", ""] for m in tensors]
    headers = ["group", "kind", "size", "step", "removal is", "tensors"]
    print_table(f"{len(groups)} coupling groups", headers, rows, right=(2, 3, 5))


def print_frozen(frozen: Sequence[Mapping[str, Any]]) -> None:
    """Print the axes that cannot be removed, with the reasons."""
    rows = [
        [", ".join(f"{m['name']}[{m['dim']}]" for m in axis["members"]), axis["size"], axis["reason"], axis["where"]]
        for axis in frozen
    ]
    print_table(f"{len(frozen)} frozen axes", ["tensors", "size", "reason", "where"], rows, right=(1,))


def print_summary(data: Mapping[str, Any]) -> None:
    """Print the main figures of a report."""
    before, after = data["cost"]["before"], data["cost"]["after"]
    rows = [
        [label, count(before[key]), count(after[key]), change(before[key], after[key])]
        for key, label in (
            ("parameters", "parameters"),
            ("total_macs", "multiply-accumulates"),
            ("activation_bytes", "activation bytes"),
        )
    ]
    times = (data.get("latency") or {"times": {}})["times"]
    for runtime in ("PyTorch", "ONNX Runtime"):
        pair = [times.get(f"{label}, {runtime}", {}).get("median_ms") for label in ("original", "result")]
        if None not in pair:
            rows.append([f"{runtime} ms", count(pair[0]), count(pair[1]), change(pair[0], pair[1])])
    samples = (data.get("samples") or {"models": {}})["models"]
    if len(samples) == 2:
        first, last = (model["score"] for model in samples.values())
        if first is not None and last is not None:
            label = f"{data['samples']['score']} of samples"
            rows.append([label, f"{first:.2f}", f"{last:.2f}", change(first, last)])
    print_table("", ["", "before", "after", "change"], rows, right=(1, 2, 3))
    _print_plan(data.get("plan"))
    for name, manifest in data.get("exports", {}).items():
        worst = max(check["max_difference"] for check in manifest["checks"])
        print_lines(f"{name}: differs from the program by {worst:.2g} at most ({manifest['tolerance']:.2g} allowed)")


def _print_plan(plan: Mapping[str, Any] | None) -> None:
    if plan is None:
        return
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in plan["shares"].items())
    print_lines(f"plan: {shares} of the evaluations; what is after is the mean of an evaluation")
    speeds = [f"{plan['predicted_speedup']:.2f} times as fast by multiply-accumulates"]
    speeds += [f"{value:.2f} measured in {runtime}" for runtime, value in plan.get("measured_speedup", {}).items()]
    print_lines(f"plan: {', '.join(speeds)}")


class Watch:
    """Tells a person how a run goes on: one line a stage, and a bar for long ones when there is a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = console(stderr=True)
        self._quiet = quiet
        self._bar: Progress | None = None
        self._begin = time.perf_counter()
        self._what = ""

    def begin(self, name: str, what: str) -> None:
        """A stage begins."""
        self._stop()
        self._what = what
        if self._quiet:
            return
        if not self._console.is_terminal:
            self._console.print(f"{what} ...", markup=False)
            return
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=self._console, transient=True
        )
        self._bar.start()
        self._task = self._bar.add_task(escape(what), total=None)

    def end(self, stage: Any) -> None:
        """The stage is done, now or by an earlier run."""
        self._stop()
        if not self._quiet:
            how = "done before" if stage.reused else f"{stage.seconds:.1f} s"
            if not stage.reused and isinstance(stage.result, Mapping) and stage.result.get("from_cache"):
                how += f" ({FROM_CACHE})"
            self._console.print(f"{self._what}: {how}", markup=False)

    def fail(self, name: str, error: Exception) -> None:
        """The stage failed, and the run goes on."""
        self._stop()
        self._console.print(f"[bold red]error:[/] {escape(f'{name}: {error}')}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=escape(what), completed=done, total=total)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
