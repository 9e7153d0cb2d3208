"""The directory of a run: finished stages with what they depended on, so that a stopped run goes on where it was.

    DIR/graphwright-run.json    says that the directory is ours
    DIR/recipe.resolved.yaml
    DIR/state/NAME.json         one per finished stage: hash of its inputs, result, seconds, hashes of its files
    DIR/NAME/...                what the stage wrote
    DIR/report.json, report.html

A stage works in a temporary directory beside its own, which is renamed when it is done; its state file is written last
and removed first. Whatever is in `state/` is therefore whole, and whatever is not is done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graph.errors import ArtifactError, GraphwrightError
from ..graph.files import PARTIAL, sha256, staged_directory, staged_file

MARK = "graphwright-run.json"
FORMAT_VERSION = 1
STATE, LOCK = "state", ".lock"
PROGRAM = "program"


class RunError(GraphwrightError):
    """A run could not go on; what it has done so far is kept."""


@dataclass(frozen=True)
class Finished:
    """A stage that was done.

    Attributes:
        name: Of the stage, and of the directory of its files.
        key: Hash of its inputs.
        seconds: How long it took when it was done.
        result: What it returned: plain data.
        files: sha256 by path below its directory.
        reused: Whether an earlier run did it.
    """

    name: str
    key: str
    seconds: float
    result: Any
    files: Mapping[str, str]
    reused: bool


def hash_of(data: Any) -> str:
    """Return the sha256 of plain data, the same for equal data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def pass_stage(index: int, name: str) -> str:
    """Return the name of the stage of the pass ``name`` at ``index``, counted from 0."""
    return f"pass-{index + 1}-{name}"


def _position(stage: str) -> int:
    """Return which pass a stage is of, counted from 1; 0 for the capture."""
    return int(stage.split("-")[1]) if stage.startswith("pass-") else 0


def _finite(data: Any) -> Any:
    """Replace numbers that JSON cannot hold by None."""
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence; other errors pass."""
    try:
        yield
    except OSError as err:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the disk is read-only",
            errno.EACCES: "writing there is not permitted",
        }
        if err.errno not in reasons:
            raise
        raise RunError(
            f"cannot write to {where}: {reasons[err.errno]}; the same command goes on where it stopped"
        ) from err


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all; one that says the same already is left alone."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    with disk_errors(path), staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


class RunDirectory:
    """A run's directory, made or taken up again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, recipe_name: str) -> RunDirectory:
        """Make ``path``, or take it up again if an earlier run made it.

        Raises:
            RunError: It is a file, or a directory that holds something else.
        """
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise RunError(f"--out {path} is a file; name a directory")
            mark = path / MARK
            if path.is_dir() and any(path.iterdir()) and not mark.exists():
                raise RunError(f"--out {path} is not empty and no earlier run made it; name another directory")
            (path / STATE).mkdir(parents=True, exist_ok=True)
        run = cls(path)
        if not mark.exists():
            write_atomic(mark, json.dumps({"format_version": FORMAT_VERSION, "recipe": recipe_name}) + "\n")
        other = run._check_mark().get("recipe")
        if other != recipe_name:
            raise RunError(f"--out {path} holds a run of the recipe {other!r}; name another directory")
        return run

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Return the run in ``path``.

        Raises:
            ArtifactError: There is none.
        """
        if not (path / MARK).is_file():
            raise ArtifactError(f"{path} is not the directory of a run: it has no {MARK}")
        run = cls(path)
        run._check_mark()
        return run

    def _check_mark(self) -> dict[str, Any]:
        try:
            mark = json.loads((self.path / MARK).read_text(encoding="utf-8"))
            version = mark["format_version"]
        except (ValueError, KeyError, TypeError) as err:
            raise ArtifactError(f"{self.path / MARK} is damaged: {err}") from None
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{self.path} has run format {version}, this release reads {FORMAT_VERSION}")
        return mark

    def finished(self, name: str) -> Finished | None:
        """Return a stage that was finished, None if it was not."""
        try:
            data = json.loads((self.path / STATE / f"{name}.json").read_text(encoding="utf-8"))
            return Finished(name, data["key"], data["seconds"], data["result"], data["files"], True)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # State files are replaced whole, so a damaged one is not ours: the stage counts as not done.
            return None

    def stages(self) -> list[Finished]:
        """Return every finished stage in the order in which they were finished."""
        files = sorted((self.path / STATE).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        return [done for file in files if (done := self.finished(file.stem)) is not None]

    def holders(self) -> list[str]:
        """Return the stages that left a program, first to last: the last one holds what the run has come to."""
        stages = [s for s in self.stages() if isinstance(s.result, dict) and "program" in s.result]
        # Not by time: a capture whose files were lost is done again after the passes.
        stages.sort(key=lambda stage: _position(stage.name))
        return list(dict.fromkeys(stage.result["program"] for stage in stages))

    def program(self, holder: str) -> Path:
        """Return the directory of the program that the stage ``holder`` left."""
        return self.path / holder / PROGRAM

    def do(self, name: str, inputs: Any, work: Callable[[Path], Any]) -> Finished:
        """Do a stage, unless it was done with the same inputs and its files are there.

        Args:
            name: Of the stage.
            inputs: Plain data that the result depends on.
            work: Writes its files below the directory it is given, which is new and empty, and returns plain data.

        Raises:
            RunError: The disk is full or not writable.
        """
        key = hash_of({"stage": name, "format_version": FORMAT_VERSION, "inputs": inputs})
        known = self.finished(name)
        if known is not None and known.key == key and self._present(known):
            return known
        start = time.perf_counter()
        with disk_errors(self.path):
            with staged_directory(self.path / name) as partial:
                # Through JSON, so that a fresh result and one read back are the same.
                result = json.loads(json.dumps(_finite(work(partial)), allow_nan=False))
                files = {
                    file.relative_to(partial).as_posix(): sha256(file)
                    for file in sorted(partial.rglob("*"))
                    if file.is_file()
                }
                seconds = time.perf_counter() - start
                (self.path / STATE / f"{name}.json").unlink(missing_ok=True)
            if not files:
                shutil.rmtree(self.path / name)
        state = {"stage": name, "key": key, "seconds": round(seconds, 3), "files": files, "result": result}
        write_atomic(self.path / STATE / f"{name}.json", json.dumps(state, indent=1) + "\n")
        return Finished(name, key, round(seconds, 3), result, files, False)

    def _present(self, stage: Finished) -> bool:
        return all((self.path / stage.name / file).is_file() for file in stage.files)

    def forget(self, name: str) -> None:
        """Remove a stage with its files."""
        (self.path / STATE / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / name, ignore_errors=True)

    def keep_only(self, names: set[str]) -> None:
        """Remove stages that the recipe no longer has."""
        for stage in self.stages():
            if stage.name not in names:
                self.forget(stage.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the directory inside the block. The lock goes with the process, however it ends.

        Raises:
            RunError: Another run is at work in it.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows, where two runs in one directory are up to the user
            yield
            return
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another run is at work in {self.path}; wait for it or name another --out") from None
            # What a killed run could not remove.
            for left in [*self.path.glob(f"{PARTIAL}*"), *(self.path / STATE).glob(f"{PARTIAL}*")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
