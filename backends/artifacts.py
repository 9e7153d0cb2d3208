"""What every written artifact has in common: a staging folder, a manifest that is written last, and checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..graph.errors import ArtifactError
from ..graph.files import sha256, staged_files


@contextmanager
def staging(directory: str | os.PathLike[str], manifest: str) -> Iterator[Path]:
    """Yield an empty folder whose files move into ``directory`` when the block ends without an error.

    The folder lies inside ``directory``, so that moving is renaming. A manifest of an earlier export goes first and
    the new one comes last: files that were moved half-way have no manifest, and no reader takes them for an
    artifact. When the block raises, ``directory`` is as it was, and it is gone if it did not exist.

    Args:
        directory: Made if it is missing, with its parents.
        manifest: File name of the manifest, which the block must write into the folder.
    """
    with staged_files(directory, last=manifest) as stage:
        yield stage
        _remove_earlier(Path(directory), manifest)


def _remove_earlier(target: Path, manifest: str) -> None:
    """Remove the artifact that an earlier export left in ``target``: its manifest first, then the files it names."""
    file = target / manifest
    if not file.is_file():
        return
    try:
        names = list(json.loads(file.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        names = []  # not written by `write_manifest`: the files of that name are replaced, no others are touched
    file.unlink()
    for name in names:
        if Path(name).name == name:
            (target / name).unlink(missing_ok=True)


def file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size in bytes and SHA-256 of every file in ``folder``, by file name. Reads every file once."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}


def write_manifest(file: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``facts`` as JSON and return what a reader gets; values that JSON does not have become their ``repr``."""
    text = json.dumps(facts, indent=2, default=repr)
    file.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def read_manifest(directory: str | os.PathLike[str], manifest: str, kind: str, version: int) -> dict[str, Any]:
    """Read a manifest and check that its files are there.

    Raises:
        ArtifactError: The manifest is missing, is no JSON, is of another kind or of a newer format version, or one
            of its files is missing or has another size.
    """
    file = Path(directory) / manifest
    if not file.is_file():
        raise ArtifactError(f"'{directory}' has no {manifest}; give the directory that the {kind} export wrote")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ArtifactError(f"'{file}' is damaged ({err}); export again") from err
    if not isinstance(facts, dict) or facts.get("kind") != kind:
        got = facts.get("kind") if isinstance(facts, dict) else type(facts).__name__
        raise ArtifactError(f"'{file}' must describe an export of kind {kind!r}, got {got!r}")
    if facts.get("format_version") != version:
        raise ArtifactError(
            f"'{file}' has format version {facts.get('format_version')}, this library reads {version}; export again"
        )
    for name, expected in facts["files"].items():
        part = Path(directory) / name
        size = part.stat().st_size if part.is_file() else None
        if size != expected["bytes"]:
            got = "is missing" if size is None else f"has {size} bytes"
            raise ArtifactError(f"'{part}' must have {expected['bytes']} bytes, it {got}; copy or export it again")
    return facts


def summary(err: BaseException | None, length: int = 400) -> str:
    """Return an error's message on one line, cut at ``length`` characters, or the name of its class."""
    text = " ".join(str(err).split())
    return text[:length] + ("..." if len(text) > length else "") if text else type(err).__name__
