"""Conditions on sizes: what they mean, what is refused, and that text from a file runs nothing."""

from __future__ import annotations

import pytest

from graphwright.graph.errors import InputError
from graphwright.graph.guards import check_guards, understood

SIZES = {"x": (6, 4), "a.b": (3,)}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("size('x', 0) < 64", True),
        ("size('x', 0) > 6", False),
        ("(size('x', 0) % 2) == 0", True),
        ("size('a.b', 0) * 2 == size('x', 0)", True),
        ("size('x', 1) // 3 != 1", False),
        ("not (2 <= size('x', 1) <= 4 and size('a.b', 0) > 5)", True),
        ("max(size('x', 0), size('x', 1)) - 1 == 5 or size('x', 0) == -1", True),
        ("floor(size('x', 0) / 4) == 1", True),
    ],
)
def test_a_condition_is_what_python_would_make_of_it(text: str, holds: bool) -> None:
    assert understood(text, list(SIZES))
    assert eval(text, {"size": lambda name, dim: SIZES[name][dim], "floor": lambda v: int(v // 1)}) is holds
    if holds:
        check_guards("Net", [text], SIZES)
    else:
        with pytest.raises(InputError, match="Net was captured where "):
            check_guards("Net", [text], SIZES)


def test_a_division_by_zero_does_not_hold() -> None:
    with pytest.raises(InputError, match="was captured where"):
        check_guards("Net", ["size('x', 0) % (size('x', 1) // 8) == 0"], SIZES)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "size('y', 0) > 1",
        "size.__class__",
        "[1 for _ in range(10)]",
        "'a' == 'a'",
        "size('x', 0",
        "(lambda: 1)()",
    ],
)
def test_anything_else_is_not_understood(text: str) -> None:
    assert not understood(text, list(SIZES))


def test_the_message_has_the_sizes_it_is_about() -> None:
    with pytest.raises(InputError, match=r"got 'x' of shape \[6, 4\], 'a.b' of shape \[3\]"):
        check_guards("Net", ["size('a.b', 0) == size('x', 0)"], SIZES)
