"""The record of an artifact, ``graphwright.json``: checking what was read before anything is built from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..graph.errors import ArtifactError
from ..graph.files import sha256
from ..graph.resize import RemovalRecord
from .artifact_state import files_of
from .write_back import WriteBackRecord

RECORD_FILE = "graphwright.json"
CONFIG_FILE = "config.json"
FORMAT = "graphwright module"
FORMAT_VERSION = 1


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in ``folder``; every failure is an `ArtifactError` of one sentence."""
    path = folder / RECORD_FILE
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a directory")
    if not path.is_file():
        plain = (folder / CONFIG_FILE).is_file()
        hint = "it looks like a plain checkpoint: load it with from_pretrained" if plain else "nothing was saved here"
        raise ArtifactError(f"{folder} has no {RECORD_FILE}; {hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as err:
        raise ArtifactError(f"{path} is damaged: {err}") from err
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no record of a module that graphwright saved")
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{path} has the format version {version!r}, expected a whole number from 1")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this graphwright reads up to {FORMAT_VERSION}; upgrade it"
        )
    kinds = {"base": dict, "tensors": dict, "attributes": dict, "classes": dict, "aliases": dict, "files": dict}
    kinds |= {"frozen_parameters": list, "self_check": dict, "groups": dict, "passes": list, "extra": dict}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            raise ArtifactError(f"{path} is damaged: '{key}' is missing or not a {kind.__name__}")
    return data


def check_files(folder: Path, data: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` unless every file of the record is there and has the content that was saved."""
    for name, digest in files_of(data).items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing")
        if sha256(path) != digest:
            raise ArtifactError(f"{path} is not the file that was saved: its sha256 differs from the record's")


def record_of(folder: Path, data: Mapping[str, Any]) -> WriteBackRecord:
    """Return what `write_back` had recorded, with the configuration beside it."""
    config = None
    if data["base"].get("kind") != "factory":
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise ArtifactError(f"{folder} is incomplete: {CONFIG_FILE} is missing")
        config = path.read_text(encoding="utf-8")
        if hashlib.sha256(config.encode()).hexdigest() != data["base"].get("config_sha256"):
            raise ArtifactError(f"{path} is not the configuration that was saved: its sha256 differs from the record's")
    try:
        return WriteBackRecord(
            removal=RemovalRecord.from_json({"groups": data["groups"], "tensors": data["tensors"]}),
            attributes={path: dict(values) for path, values in data["attributes"].items()},
            classes={path: (str(name), float(scale)) for path, (name, scale) in data["classes"].items()},
            extra=data["extra"],
            config=config,
            inputs=data.get("inputs"),
            inputs_note=str(data.get("inputs_note", "")),
            passes=tuple(data["passes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ArtifactError(f"{folder / RECORD_FILE} is damaged: {type(err).__name__}: {err}") from err
