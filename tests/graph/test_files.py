"""Staged files: whole or not at all, with the permissions of ordinary files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from graphwright.graph.files import sha256, staged_directory, staged_file, staged_files


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"weights" * 100_000).hexdigest()


def test_staged_file_appears_whole_and_replaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with staged_file(tmp_path / "a.txt") as file:
        assert file.suffix == ".txt"
        file.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert listing(tmp_path) == {"a.txt": "new"}


def test_staged_file_leaves_the_old_one_when_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="half"), staged_file(tmp_path / "a.txt") as file:
        file.write_text("new")
        raise RuntimeError("half")
    assert listing(tmp_path) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["a.txt"]


def test_staged_files_move_the_last_one_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), real(a, b)))
    target = tmp_path / "deep" / "out"
    with staged_files(target, "a.json") as stage:
        for name in ("a.json", "b", "c"):
            (stage / name).write_text(name)
    assert moved == ["b", "c", "a.json"]
    assert listing(target) == {"a.json": "a.json", "b": "b", "c": "c"}
    assert sorted(os.listdir(target)) == ["a.json", "b", "c"]


def test_staged_files_leave_no_directory_behind_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_files(tmp_path / "deep" / "out", "a") as stage:
        (stage / "a").write_text("a")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_staged_directory_replaces_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with staged_directory(target) as stage:
        (stage / "fresh").write_text("new")
    assert listing(tmp_path) == {"out/fresh": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_staged_directory_is_put_back_when_the_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("old")
    real = os.rename

    def rename(source: Path, to: Path) -> None:
        if Path(source).name == "new":
            raise OSError("no")
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no"), staged_directory(target) as stage:
        (stage / "fresh").write_text("new")
    assert listing(tmp_path) == {"out/kept": "old"}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_and_directories_get_the_modes_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with staged_directory(tmp_path / "out") as stage:
            (stage / "private").touch(mode=0o600)
        with staged_files(tmp_path / "files", "private") as stage:
            (stage / "private").touch(mode=0o600)
        with staged_file(tmp_path / "file") as file:
            file.touch(mode=0o600)
    finally:
        os.umask(before)
    for file in (tmp_path / "out" / "private", tmp_path / "files" / "private", tmp_path / "file"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file
    for folder in (tmp_path / "out", tmp_path / "files"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask, folder
