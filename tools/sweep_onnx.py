"""ONNX sweep: every architecture of the zoo, a random half of every group removed, exported, run in ONNX Runtime.

    python -m graphwright.tools.sweep_onnx [NAME ...] [--family F] [--json FILE] [--again]

The file is checked by ``onnx.checker``, loaded on the CPU and compared with the smaller program in PyTorch: on the
example, on other values, and at a second batch size where the batch is dynamic. Where they differ by more than 1e-4
of the largest output, the file is compared with the program in float64 instead, by the same bound. With ``--json``
the file is written after every model, and models that it has already are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.artifacts import summary
from ..backends.compare import inputs_at_other_sizes, run_program
from ..backends.onnx_export import OnnxArtifact, export_onnx
from ..frontends.capture import capture
from ..graph.compare import dynamic_sizes, example_like, relative_difference, tolerance_for
from ..graph.depgraph import depgraph
from ..graph.errors import GraphwrightError
from ..graph.files import staged_file
from ..graph.program import Program
from ..graph.resize import reconcile, resize
from .sweep import in_float64, outputs_of, random_keep, select, short
from .zoo import missing
from .zoo.entry import Case, Entry

LIMIT = tolerance_for(torch.float32, "runtime")
STATUSES = ("ok", "refused", "wrong", "raised", "skipped")


@dataclass
class OnnxRow:
    """What the sweep found for one model.

    Attributes:
        name: Of the entry.
        family: Of the entry.
        status: ``ok``; ``refused`` by us with a reason; ``wrong``: the file computes something else; ``raised``
            anything else; ``skipped``: a package is missing.
        reason: Why it is not ok, in one line.
        opset: ONNX operator set of the file.
        batch: ``dynamic`` or ``static``.
        error: Largest difference at the example's shape, relative to the largest magnitude of the output; None
            without a comparison.
        error_second: The same at a second shape; of a static capture at other values of the same shape.
        parameters_before: Elements of the program's tensors before the removal.
        parameters_after: And after it.
        groups: How many coupling groups lost indices.
        seconds: CPU seconds of everything.
    """

    name: str
    family: str
    status: str = "raised"
    reason: str = ""
    opset: int = 0
    batch: str = ""
    error: float | None = None
    error_second: float | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    groups: int = 0
    seconds: float = 0.0


def sweep_entry(entry: Entry, seed: int = 0) -> OnnxRow:
    """Build one model, remove half of every group, export it and compare the file with the smaller program."""
    row = OnnxRow(entry.name, entry.family)
    absent = missing(entry)
    if absent:
        row.status, row.reason = "skipped", f"needs {', '.join(absent)}"
        return row
    start = time.process_time()
    try:
        case = entry.build()
        program = capture(case.model, case.args, case.kwargs, case.dynamic)
        _remove_half(row, program, seed)
        row.batch = "dynamic" if dynamic_sizes(program) else "static"
        _export(row, program, entry, case, seed)
    except GraphwrightError as err:
        row.status, row.reason = "refused", summary(err)
    except Exception as err:  # the sweep reports every failure of every model and goes on
        row.status, row.reason = "raised", short(err)
    row.seconds = round(time.process_time() - start, 1)
    return row


def _remove_half(row: OnnxRow, program: Program, seed: int) -> None:
    """Remove a random legal half of every group from ``program``, in place."""
    generator = torch.Generator().manual_seed(seed)
    graph = depgraph(program)
    keep = reconcile(graph, {g.name: random_keep(g, generator) for g in graph.groups})[0]
    row.parameters_before = _size(program)
    row.groups = sum(len(keep[g.name]) < g.size for g in graph.groups if g.name in keep)
    if row.groups:
        resize(program, keep, graph)
    row.parameters_after = _size(program)


def _size(program: Program) -> int:
    return sum(tensor.numel() for tensor in program.tensors().values())


def _export(row: OnnxRow, program: Program, entry: Entry, case: Case, seed: int) -> None:
    """Export to a temporary folder and compare at two shapes."""
    second = [case.second] if case.second is not None and row.batch == "dynamic" else []
    with tempfile.TemporaryDirectory(prefix="graphwright-sweep-") as folder:
        # Any difference is accepted here, so that the row can say how large it is.
        artifact = export_onnx(program, folder, providers=["cpu"], tolerance=math.inf, check_inputs=second, seed=seed)
        row.opset = artifact.opset
        row.error, row.error_second = _errors(artifact, row.batch)
        apart = max(row.error, row.error_second)
        if LIMIT < apart < math.inf:
            row.error, row.error_second = _errors_in_float64(artifact, program, entry, case, seed)
    largest = max((float(v.abs().max()) for v in outputs_of(program, case) if v.numel()), default=0.0)
    if largest < 1e-8:
        row.status, row.reason = "wrong", "the output is near zero, so that comparing shows nothing"
    elif not max(row.error, row.error_second) <= LIMIT:
        row.status, row.reason = "wrong", f"a relative difference of {apart:.2e}"
    else:
        row.status = "ok"
        if apart > LIMIT:
            row.reason = f"compared with float64; the program in float32 is {apart:.2e} from the file"


def _errors(artifact: OnnxArtifact, batch: str) -> tuple[float, float]:
    """Return the largest difference at the example's shape, and at the second one."""
    found = [check["max_difference"] for check in artifact.manifest["checks"]]  # example, other values, other shapes
    return (max(found[:2]), max(found[2:])) if batch == "dynamic" else (found[0], max(found[1:]))


def _errors_in_float64(
    artifact: OnnxArtifact, program: Program, entry: Entry, case: Case, seed: int
) -> tuple[float, float]:
    """Return how far the file is from the same removal in float64, at the example's shape and at the second one.

    A model may amplify rounding so much that two right answers in float32 are further apart than the bound. The
    bound stays; what the file is compared with gets more precise.
    """
    # Built again: making it float64 would change the tensors that the program shares with its module.
    double = in_float64(entry.build())
    precise = capture(double.model, double.args, double.kwargs, case.dynamic)
    _remove_half(OnnxRow(entry.name, entry.family), precise, seed)
    calls = [list(program.example), example_like(program, seed=seed)]
    first = len(calls)
    if dynamic_sizes(program):
        calls += [] if case.second is None else [program.flatten(*case.second[0], **case.second[1])]
        calls.append(inputs_at_other_sizes(program, None, seed + 1)[0])
    else:
        first = 1
    runner, worst = artifact.runner(["cpu"]), list[float]()
    for call in calls:
        wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in call]
        want = [v for v in run_program(precise, wide) if isinstance(v, Tensor)]
        got = runner(*(v for v in call if isinstance(v, Tensor)))
        same = [v.to(w.dtype) for v, w in zip(got, want, strict=True)]
        worst.append(max(relative_difference(same, want)))
    return max(worst[:first]), max(worst[first:])


def sweep(
    chosen: Sequence[Entry],
    file: str | os.PathLike[str] | None = None,
    *,
    again: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> list[OnnxRow]:
    """Return a row for every entry.

    Args:
        chosen: The entries.
        file: JSON file of rows. Entries that it has are not run again, and every new row is written to it at once;
            rows of other entries stay.
        again: Run the entries that the file has, too.
        seed: Of the removal.
        tell: Called with one line for each model that was run.
    """
    rows = {} if file is None else read_rows(file)
    todo = [entry for entry in chosen if again or entry.name not in rows]
    for i, entry in enumerate(todo):
        rows[entry.name] = sweep_entry(entry, seed)
        tell(f"[{i + 1}/{len(todo)}] {line_of(rows[entry.name])}")
        if file is not None:
            _write_rows(file, list(rows.values()))
    return [rows[entry.name] for entry in chosen]


def read_rows(file: str | os.PathLike[str]) -> dict[str, OnnxRow]:
    """Return the rows of a JSON file by name; none if there is no file.

    Raises:
        ValueError: The file holds something else.
    """
    path = Path(file)
    if not path.exists():
        return {}
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return {row["name"]: OnnxRow(**row) for row in found}
    except (TypeError, KeyError, ValueError) as err:
        raise ValueError(f"'{path}' must hold rows that this sweep wrote ({err}); name another file") from err


def _write_rows(file: str | os.PathLike[str], rows: Sequence[OnnxRow]) -> None:
    with staged_file(file) as partial:
        partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def line_of(row: OnnxRow) -> str:
    """Return a row as one line of text."""
    if row.status == "skipped":
        return f"{row.name:40} skipped: {row.reason}"
    errors = "".join(f"{'-' if e is None else format(e, '.1e'):>9}" for e in (row.error, row.error_second))
    share = row.parameters_after / row.parameters_before if row.parameters_before else 1.0
    return (
        f"{row.name:40} {row.status:8}{row.opset:6} {row.batch:8}{errors}{share:6.0%}{row.seconds:7.1f}  {row.reason}"
    ).rstrip()


def table(rows: Sequence[OnnxRow]) -> str:
    """Return the rows as text, with totals for each family."""
    head = f"{'model':40} {'status':8}{'opset':>6} {'batch':8}{'example':>9}{'second':>9}{'left':>6}{'sec':>7}"
    lines = [head, *(line_of(row) for row in rows)]
    for family in dict.fromkeys(row.family for row in rows):
        counts = Counter(row.status for row in rows if row.family == family)
        lines.append(f"{family}: " + ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s] or s != "skipped"))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; exit status 1 if anything was wrong or raised."""
    parser = argparse.ArgumentParser(
        prog="graphwright.tools.sweep_onnx", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="entries, or prefixes of entries; all without")
    parser.add_argument("--family", action="append", help="only entries of this family")
    parser.add_argument("--json", help="keep the rows in this file, and skip the models that it has")
    parser.add_argument("--again", action="store_true", help="run the models that the file has, too")
    parser.add_argument("--seed", type=int, default=0, help="of the removal")
    options = parser.parse_args(argv)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    chosen = select(options.names, options.family)
    rows = sweep(chosen, options.json, again=options.again, seed=options.seed, tell=tell)
    print(table(rows))
    return 1 if any(row.status in ("wrong", "raised") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
