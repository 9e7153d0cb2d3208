"""The helpers that error messages are made with, and that every error class has one home."""

from __future__ import annotations

import inspect

import pytest

import graphwright
from graphwright.graph import errors
from graphwright.graph.errors import first_line, unknown


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("ratoi", ["ratio", "seed"], "no option 'ratoi'; did you mean 'ratio'?"),
        ("xyz", ["seed", "ratio"], "no option 'xyz'; known: ratio, seed"),
        ("xyz", [], "no option 'xyz'; known: none"),
        ("xyz", [f"{i:02}" for i in range(30)], ", 23 and 6 more"),
    ],
)
def test_unknown_names_the_nearest_or_the_known(name: str, known: list[str], expected: str) -> None:
    assert unknown("no option", name, known).endswith(expected)


def test_first_line_skips_empty_lines_and_falls_back_to_the_class() -> None:
    assert first_line(RuntimeError("\n\n  what  \nmore")) == "what"
    assert first_line(RuntimeError()) == "RuntimeError"


def test_every_error_is_public_and_a_graphwright_error() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert len(classes) > 8
    assert all(issubclass(c, errors.GraphwrightError) for c in classes)
    assert {c.__name__ for c in classes} <= set(graphwright.__all__)
