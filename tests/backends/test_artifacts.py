"""Staging and manifests: complete, or not there at all."""

import json
import os
from pathlib import Path

import pytest

from graphwright.backends.artifacts import file_facts, read_manifest, staging, summary, write_manifest
from graphwright.graph.errors import ArtifactError


def write_artifact(directory: Path, content: bytes = b"weights", extra: str | None = None) -> None:
    with staging(directory, "manifest.json") as stage:
        (stage / "model.bin").write_bytes(content)
        if extra:
            (stage / extra).write_bytes(b"more")
        write_manifest(
            stage / "manifest.json", {"kind": "toy", "format_version": 1, "files": file_facts(stage), "notes": {1, 2}}
        )


def test_files_arrive_and_the_folder_for_staging_is_gone(tmp_path: Path) -> None:
    write_artifact(tmp_path / "deep" / "out")
    assert sorted(file.name for file in (tmp_path / "deep" / "out").iterdir()) == ["manifest.json", "model.bin"]
    facts = read_manifest(tmp_path / "deep" / "out", "manifest.json", "toy", 1)
    # Of the bytes b"weights", by sha256sum.
    assert facts["files"]["model.bin"]["sha256"].startswith("9a129038d9a0")
    assert facts["notes"] == "{1, 2}"


def test_failure_leaves_no_directory_that_was_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), staging(tmp_path / "deep" / "out", "manifest.json") as stage:
        (stage / "model.bin").write_bytes(b"half")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_artifact(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), staging(tmp_path, "manifest.json") as stage:
        (stage / "model.bin").write_bytes(b"other")
        raise RuntimeError
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_second_export_removes_what_only_the_first_had(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_artifact(tmp_path, extra="old.data")
    assert (tmp_path / "old.data").exists()
    write_artifact(tmp_path, b"new weights")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "model.bin", "notes.txt"]
    assert (tmp_path / "model.bin").read_bytes() == b"new weights"


def test_interrupted_move_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifact(tmp_path)
    moved: list[str] = []

    def replace(source: Path, target: Path) -> None:
        if moved:
            raise OSError("disk full")
        moved.append(target.name)
        os.rename(source, target)

    monkeypatch.setattr("graphwright.backends.artifacts.os.replace", replace)
    with pytest.raises(OSError, match="disk full"):
        write_artifact(tmp_path, b"new weights", extra="a.data")
    assert moved == ["a.data"]
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_manifest(tmp_path, "manifest.json", "toy", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "model.bin").unlink(), r"model\.bin' must have 7 bytes, it is missing"),
        (lambda d: (d / "model.bin").write_bytes(b"wei"), r"must have 7 bytes, it has 3 bytes"),
        (lambda d: (d / "manifest.json").write_text("{"), "is damaged"),
        (lambda d: (d / "manifest.json").write_text("[]"), "must describe an export of kind 'toy', got 'list'"),
        (lambda d: (d / "manifest.json").write_text(json.dumps({"kind": "toy", "format_version": 2})), "version 2"),
        (lambda d: (d / "manifest.json").write_text(json.dumps({"kind": "other"})), "got 'other'"),
    ],
)
def test_damaged_artifact_is_refused(tmp_path: Path, change, message: str) -> None:
    write_artifact(tmp_path)
    change(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path, "manifest.json", "toy", 1)


def test_summary_is_one_line_and_bounded() -> None:
    assert summary(ValueError("a\n  b")) == "a b"
    assert summary(ValueError()) == "ValueError"
    assert summary(ValueError("x" * 500), 10) == "x" * 10 + "..."
