"""Check what a directory holds: hashes of its files, that everything loads, that exports still compute the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..frontends.artifact_record import RECORD_FILE
from ..graph.document_files import PLAN_FORM, PROGRAM_FORM
from ..graph.errors import ArtifactError, GraphwrightError
from ..graph.files import sha256
from ..graph.plan import Plan
from ..graph.program import Program
from .artifacts import kind_of, load_call, read_facts, stages_of
from .compare import differences, second_sizes
from .outputs import Output, load_output, programs_of
from .run import CAPTURE, ONNX, ONNX_ORIGINAL, TORCHSCRIPT
from .run_dir import MARK, PROGRAM, Finished, RunDirectory

Finding = dict[str, Any]


def examine(directory: Path) -> list[Finding]:
    """Check a run, an export, a saved program or a saved module.

    Returns:
        Findings with ``what`` was checked, whether it is ``ok``, and what was ``found``.

    Raises:
        ArtifactError: The directory holds none of these.
    """
    if (directory / MARK).is_file():
        return list(_run(directory))
    for form in (PROGRAM_FORM, PLAN_FORM):
        if (directory / form.file).is_file():
            return [_loads(f"saved {form.noun}", lambda: load_output(directory))[0]]
    if kind_of(directory) is not None:
        return list(_export(directory))
    if (directory / RECORD_FILE).is_file():
        from ..frontends.artifact import load

        return [_loads("saved module and its self-check", lambda: load(directory))[0]]
    if not directory.is_dir():
        raise ArtifactError(f"there is no directory {directory}")
    raise ArtifactError(f"{directory} is not of a run, an export, a saved program or a saved module")


def _run(directory: Path) -> Iterator[Finding]:
    run = RunDirectory.existing(directory)
    stages = run.stages()
    if not stages:
        yield _finding("stages", False, "none is finished; run the recipe again")
    for stage in stages:
        if stage.files:
            yield _hashes(directory, stage)
    outputs: dict[str, Output] = {}
    holders = run.holders()
    for holder in holders:
        finding, output = _loads(f"{holder}/{PROGRAM}", lambda h=holder: load_output(run.program(h)))
        yield finding
        if output is not None:
            outputs[holder] = output
    for name in (ONNX_ORIGINAL, ONNX, TORCHSCRIPT):
        holder = CAPTURE if name == ONNX_ORIGINAL else (holders[-1] if holders else "")
        if any(stage.name == name for stage in stages) and holder in outputs:
            for stage, program in programs_of(outputs[holder]).items():
                part = stage if isinstance(outputs[holder], Plan) else None
                yield from _compared(directory / name, name, program, part)


def _hashes(directory: Path, stage: Finished) -> Finding:
    changed = []
    for file, expected in stage.files.items():
        path = directory / stage.name / file
        if not path.is_file():
            changed.append(f"{file} is missing")
        elif sha256(path) != expected:
            changed.append(f"{file} was changed")
    what = f"{stage.name}: files"
    return _finding(what, not changed, "; ".join(changed) or f"{len(stage.files)} as they were written")


def _export(directory: Path) -> Iterator[Finding]:
    manifest = read_facts(directory)
    for name, facts in manifest["files"].items():
        file = directory / name
        intact = file.is_file() and sha256(file) == facts["sha256"]
        yield _finding(name, intact, "as it was written" if intact else "missing or changed; export again")
    finding, _ = _loads("loads", lambda: load_call(directory))
    yield finding


def _compared(directory: Path, export: str, program: Program, stage: str | None) -> Iterator[Finding]:
    name = export if stage is None else f"{export}/{stage}"
    finding, call = _loads(f"{name}: loads", lambda: load_call(directory, stage=stage))
    if call is None:
        yield finding
        return
    manifest = stages_of(read_facts(directory), export)[name]
    limit = float(manifest["tolerance"])
    shapes: dict[str, Any] = {"example sizes": None}
    if str(kind_of(directory)).startswith("onnx"):
        other = second_sizes(program, True)
        if other is not None:
            shapes[", ".join(f"{k}={v}" for k, v in other.items())] = other
    for label, sizes in shapes.items():
        what = f"{name}: compared with the program at {label}"
        try:
            apart = differences(program, call, sizes)["max_rel"]
        except GraphwrightError as err:
            yield _finding(what, False, str(err))
            continue
        yield _finding(what, apart <= limit, f"relative difference {apart:.2g}, {limit:.2g} allowed")


def _loads(what: str, load: Callable[[], Any]) -> tuple[Finding, Any]:
    try:
        loaded = load()
        return _finding(what, True, "loads"), loaded
    except GraphwrightError as err:
        return _finding(what, False, str(err)), None


def _finding(what: str, ok: bool, found: str) -> Finding:
    return {"what": what, "ok": ok, "found": found}
