"""The text form of passes: ``remove-channels{ratio=0.5, scope=global}``, for the command line, logs and recipes.

parse("remove-channels{ratio=0.5}") == ("remove-channels", {"ratio": 0.5})
show(RemoveChannels(ratio=0.3)) == "remove-channels{ratio=0.3}"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Pass

Path = tuple[str | int, ...]


class OptionError(ValueError):
    """An option that does not exist or has a wrong value.

    Attributes:
        path: Where in the options: keys of mappings and positions in lists, outermost first.
    """

    def __init__(self, message: str, path: Path = ()) -> None:
        super().__init__(message)
        self.path = path

    def below(self, *path: str | int) -> OptionError:
        """Return the same error with ``path`` in front of its own."""
        return OptionError(str(self), (*path, *self.path))


_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_NUMBER = re.compile(r"[+-]?(?:inf|nan|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])")
_NAMES = {"true": True, "false": False, "none": None, "null": None}
_BRACKETS = {"[": "]", "(": ")"}


def show(value: Pass) -> str:
    """Return ``name{option=value, ...}`` with the options that differ from their defaults; `parse` reads it back."""
    changed = [f.name for f in fields(value) if f.init and getattr(value, f.name) != default_of(f)]
    inside = ", ".join(f"{name}={show_value(getattr(value, name))}" for name in changed)
    return f"{value.name}{{{inside}}}" if inside else value.name


def show_value(value: Any) -> str:
    """Return one option value in the text form."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        bare = _WORD.fullmatch(value) and value.lower() not in _NAMES and not _NUMBER.fullmatch(value)
        return value if bare else _quoted(value)
    if callable(value):
        # From Python only: `parse` reads it back as text, which no option that takes a function does.
        return _quoted(qualified_name(value))
    if is_dataclass(value) and not isinstance(value, type):
        return show_value({f.name: getattr(value, f.name) for f in fields(value) if f.init})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{show_value(k)}: {show_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(show_value, value)) + "]"
    return repr(value)


def qualified_name(function: Any) -> str:
    """Return ``module:name`` of a function, of what a partial one calls, or of the class of a callable object."""
    named = function.func if isinstance(function, partial) else function
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}:{named.__qualname__}"


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``name`` or ``name{option=value, ...}``.

    Values are numbers, ``true``, ``false``, ``null``, bare or quoted text, ``[lists]`` and ``{key: value}`` mappings.
    Python's own spelling of tuples, quotes and truth values is read as well.

    Raises:
        OptionError: The text is malformed; shows where.
    """
    reader = _Reader(text)
    name = reader.word("the name of a pass")
    values = reader.mapping("=") if reader.peek() == "{" else {}
    reader.end()
    return name, values


class _Reader:
    """A cursor over the text form."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, wanted: str) -> OptionError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        return OptionError(f"expected {wanted} at position {self.at + 1} of {self.text!r}, found {found}")

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, *wanted: str) -> str:
        if self.peek() not in wanted or not self.peek():
            raise self.fail(" or ".join(map(repr, wanted)))
        self.at += 1
        return self.text[self.at - 1]

    def end(self) -> None:
        if self.peek():
            raise self.fail("the end")

    def word(self, wanted: str) -> str:
        self.peek()
        found = _WORD.match(self.text, self.at)
        if not found:
            raise self.fail(wanted)
        self.at = found.end()
        return found.group()

    def mapping(self, *signs: str) -> dict[str, Any]:
        self.take("{")
        values: dict[str, Any] = {}
        while self.peek() != "}":
            key = self.quoted() if self.peek() in ("'", '"') else self.word("an option")
            if key in values:
                raise OptionError(f"the option {key!r} is given twice in {self.text!r}", (key,))
            self.take(*signs)
            values[key] = self.value()
            if self.peek() != "}":
                self.take(",", "}")
        self.take("}")
        return values

    def items(self) -> list[Any]:
        close = _BRACKETS[self.take("[", "(")]
        values: list[Any] = []
        while self.peek() != close:
            values.append(self.value())
            if self.peek() != close:
                self.take(",", close)
        self.take(close)
        return values

    def quoted(self) -> str:
        quote, out = self.take("'", '"'), []
        while self.at < len(self.text) and self.text[self.at] != quote:
            if self.text[self.at] == "\\":
                self.at += 1
                out.append(_unescaped(self.text[self.at : self.at + 1]))
            else:
                out.append(self.text[self.at])
            self.at += 1
        if self.at >= len(self.text):
            raise self.fail(f"a closing {quote}")
        self.at += 1
        return "".join(out)

    def value(self) -> Any:
        first = self.peek()
        if first in ("'", '"'):
            return self.quoted()
        if first == "{":
            return self.mapping(":", "=")
        if first in _BRACKETS:
            return self.items()
        number = _NUMBER.match(self.text, self.at)
        if number:
            self.at = number.end()
            text = number.group()
            return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
        word = self.word("a value")
        return _NAMES.get(word.lower(), word)


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    for short, char in _ESCAPES.items():
        text = text.replace(char, f"\\{short}")
    return f'"{text}"'


def _unescaped(char: str) -> str:
    return _ESCAPES.get(char, char)


def default_of(f: Any) -> Any:
    """Return the default of a dataclass field, ``MISSING`` where it has none."""
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING


__all__ = ["OptionError", "Path", "default_of", "parse", "qualified_name", "show", "show_value"]
