"""Files that are written whole or not at all: under a temporary name in the same directory, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What is being written has a name that starts with this.
PARTIAL = ".partial-"


def sha256(file: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file's content, read in pieces."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def staged_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, which gets the name ``target`` when the block ends without an error.

    The path ends like ``target``. When the block raises, or writes nothing, ``target`` is as it was.

    Raises:
        OSError: The directory of ``target`` does not exist or cannot be written.
    """
    target = Path(target)
    stage = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target.parent))
    try:
        file = stage / target.name
        yield file
        if file.exists():
            _give_ordinary_modes(stage)
            os.replace(file, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_files(directory: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """Yield an empty folder whose files move into ``directory`` when the block ends without an error.

    The folder lies inside ``directory``, so that moving is renaming. The file ``last``, which vouches for the others,
    is moved after them. Other files in ``directory`` stay. When the block raises, ``directory`` is as it was, and it
    is gone if it did not exist.

    Args:
        directory: Made if it is missing, with its parents.
        last: File name of what is moved last.
    """
    target = Path(directory)
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    target.mkdir(parents=True, exist_ok=True)
    try:
        stage = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target))
        try:
            yield stage
            _give_ordinary_modes(stage)
            for file in sorted(stage.iterdir(), key=lambda file: (file.name == last, file.name)):
                os.replace(file, target / file.name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        for folder in missing:
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


@contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that gets the name ``target`` when the block ends without an error.

    What had that name before is replaced as a whole, and is back in its place when the renaming fails. When the block
    raises, ``target`` is as it was.

    Args:
        target: A directory or nothing; its parents are made if they are missing.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target.parent))
    try:
        new, old = stage / "new", stage / "old"
        new.mkdir()
        yield new
        _give_ordinary_modes(new)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _give_ordinary_modes(folder: Path) -> None:
    """Give the files in ``folder`` at least the permissions of a file that was just opened for writing.

    Some libraries write through temporary files of their own, which only their owner may read.
    """
    probe = folder / f"{PARTIAL}mode"
    probe.touch()
    ordinary = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode & 0o7777 | ordinary)


__all__ = ["PARTIAL", "sha256", "staged_directory", "staged_file", "staged_files"]
