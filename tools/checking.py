"""Check what a directory holds: hashes of its files, that everything loads, that exports still compute the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..frontends.artifact_record import RECORD_FILE
from ..graph.document_files import PROGRAM_FORM
from ..graph.errors import ArtifactError, GraphwrightError
from ..graph.files import sha256
from ..graph.program import Program
from ..graph.serialize import load_program
from .artifacts import kind_of, load_call, read_facts
from .compare import differences, second_sizes
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
    if (directory / PROGRAM_FORM.file).is_file():
        return [_loads("saved program", lambda: load_program(directory))[0]]
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
    programs: dict[str, Program] = {}
    holders = run.holders()
    for holder in holders:
        finding, program = _loads(f"{holder}/{PROGRAM}", lambda h=holder: load_program(run.program(h)))
        yield finding
        if program is not None:
            programs[holder] = program
    for name in (ONNX_ORIGINAL, ONNX, TORCHSCRIPT):
        holder = CAPTURE if name == ONNX_ORIGINAL else (holders[-1] if holders else "")
        if any(stage.name == name for stage in stages) and holder in programs:
            yield from _compared(directory / name, name, programs[holder])


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


def _compared(directory: Path, name: str, program: Program) -> Iterator[Finding]:
    finding, call = _loads(f"{name}: loads", lambda: load_call(directory))
    if call is None:
        yield finding
        return
    manifest = read_facts(directory)
    limit = float(manifest["tolerance"])
    shapes: dict[str, Any] = {"example sizes": None}
    if kind_of(directory) == "onnx":
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
