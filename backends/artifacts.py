"""What every written artifact has in common: a staging folder, a manifest that is written last, checksums, and inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import ArtifactError, InputError
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


def tensor_entry(name: str, dtype: torch.dtype | None, shape: Sequence[int | str]) -> dict[str, Any]:
    """Return what a manifest says of an input or output; named sizes are dynamic."""
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def bind_inputs(what: str, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call by name, in the order of ``names``.

    Args:
        what: The artifact, as the message calls it.
        names: Of its inputs.
        args: Given in this order.
        kwargs: Given by name.

    Raises:
        InputError: There are too many, one is missing or unknown, or one is given twice.
    """
    if len(args) > len(names):
        raise InputError(f"this {what} takes {len(names)} tensors {list(names)}, got {len(args)}")
    given = dict(zip(names, args, strict=False))
    wrong = [name for name in kwargs if name not in names or name in given]
    given.update((name, value) for name, value in kwargs.items() if name not in wrong)
    missing = [name for name in names if name not in given]
    if wrong or missing:
        raise InputError(
            f"this {what} takes the inputs {list(names)}; missing: {missing}, unknown or given twice: {wrong}"
        )
    return {name: given[name] for name in names}


def check_tensor(entry: Mapping[str, Any], value: object, kinds: str = "a tensor") -> Tensor:
    """Return ``value``, the input that ``entry`` of a manifest describes.

    Args:
        entry: As `tensor_entry` made it.
        value: Given by the caller.
        kinds: What the caller may give, in words.

    Raises:
        InputError: It is no tensor, or has another dtype.
    """
    name, dtype = entry["name"], entry["dtype"]
    if not isinstance(value, Tensor):
        raise InputError(f"input '{name}' must be {kinds}, got {type(value).__name__}")
    if str(value.dtype) != f"torch.{dtype}":
        raise InputError(f"input '{name}' must have dtype torch.{dtype}, got {value.dtype}")
    return value


def summary(err: BaseException | None, length: int = 400) -> str:
    """Return an error's message on one line, cut at ``length`` characters, or the name of its class."""
    text = " ".join(str(err).split())
    return text[:length] + ("..." if len(text) > length else "") if text else type(err).__name__
