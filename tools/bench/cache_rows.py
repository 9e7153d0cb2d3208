"""Rows of a long benchmark: written as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...graph.errors import LoadError
from ..run_dir import write_atomic

Row = dict[str, Any]


class Rows:
    """Rows by part and key.

    Args:
        file: Read if it is there, and written after every unit of rows; None keeps them in memory.
        environment: Of this run. The file lists those of all runs that added to it.

    Raises:
        LoadError: The file is no file of rows.
    """

    def __init__(self, file: Path | None, environment: Mapping[str, Any]) -> None:
        self._file = file
        self.parts: dict[str, dict[str, list[Row]]] = {}
        self._runs: list[Mapping[str, Any]] = []
        if file is not None and file.exists():
            data = _read(file)
            self.parts, self._runs = data["parts"], data["environments"]
        self._environment = environment

    def unit(self, part: str, key: str, make: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of a key: those of the file, or made now and written.

        Args:
            part: Of the benchmark.
            key: Names all settings that the rows depend on.
            make: Measures.
        """
        known = self.parts.setdefault(part, {})
        if key in known:
            progress(f"{part}: {key}: from {self._file}")
            return known[key]
        progress(f"{part}: {key} ...")
        known[key] = make()
        if self._environment not in self._runs:
            self._runs.append(self._environment)
        if self._file is not None:
            text = json.dumps({"environments": self._runs, "parts": self.parts}, indent=1)
            write_atomic(self._file, text + "\n")
        return known[key]


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise LoadError(f"{file} is no file of benchmark rows: {err}; name another one, or remove it") from err
    if not isinstance(data, dict) or {"environments", "parts"} - set(data):
        raise LoadError(f"{file} is no file of benchmark rows: it has no 'parts'; name another one, or remove it")
    return data


def progress(line: str) -> None:
    """Say on standard error what goes on."""
    print(line, file=sys.stderr, flush=True)


def cheapest_first(rows: Sequence[Row], cost: str = "mac_ratio") -> list[Row]:
    """Return rows by cost; rows without one, such as refusals, come last in their own order."""
    return sorted(rows, key=lambda row: (row.get(cost) is None, row.get(cost) or 0.0))


def front(rows: Sequence[Row], quality: str, cost: str = "mac_ratio") -> set[int]:
    """Return the places of the rows that no other row beats: none costs as little or less and is as good or better.

    Args:
        rows: Without a number in either column they are left out.
        quality: Column in which less is better.
        cost: Column in which less is better.
    """
    known = [(i, row[cost], row[quality]) for i, row in enumerate(rows) if row.get(cost) is not None and quality in row]
    beaten = {
        i
        for i, spent, bad in known
        for j, other_spent, other_bad in known
        if i != j and other_spent <= spent and other_bad <= bad and (other_spent, other_bad) != (spent, bad)
    }
    return {i for i, _, _ in known} - beaten
