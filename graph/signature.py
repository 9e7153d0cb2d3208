"""The call signature of what was captured: callers may pass inputs by position or by name, and give defaults or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError

_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "either",
    inspect.Parameter.VAR_POSITIONAL: "args",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "kwargs",
}
_PLAIN = (type(None), bool, int, float, str)
REQUIRED = "<required>"


@dataclass(frozen=True)
class Argument:
    """One parameter of a signature.

    Attributes:
        name: As written.
        kind: ``positional``, ``either``, ``keyword``, ``args`` or ``kwargs``.
        default: Its default value; `REQUIRED` if there is none, or none that is plain data.
    """

    name: str
    kind: str
    default: Any = REQUIRED


Signature = tuple[Argument, ...]


def signature_of(function: Callable[..., Any]) -> Signature:
    """Return the signature of a function or method."""
    return tuple(
        Argument(p.name, _KINDS[p.kind], p.default if isinstance(p.default, _PLAIN) else REQUIRED)
        for p in inspect.signature(function).parameters.values()
    )


def arranged(
    program: str,
    signature: Signature,
    positional: int,
    keywords: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a call in the form of the capture.

    Args:
        program: Its name, for messages.
        signature: Of the captured function.
        positional: How many inputs the capture was given by position.
        keywords: Names of those it was given by name, in their order.
        args: What the call gives by position.
        kwargs: What it gives by name.

    Raises:
        InputError: An input is missing or unknown, is given twice, or was not captured and is not its default.
    """
    by_position = [a.name for a in signature if a.kind in ("positional", "either")]
    if any(a.kind == "args" for a in signature) or positional > len(by_position):
        return tuple(args), dict(kwargs)
    given = _named(program, by_position, args, kwargs)
    known = {a.name: a.default for a in signature}
    captured = [*by_position[:positional], *keywords]
    values = {}
    for name in captured:
        value = given.pop(name, known.get(name, REQUIRED))
        if value is REQUIRED:
            raise InputError(f"input '{name}' of {program} is missing; it was captured with {', '.join(captured)}")
        values[name] = value
    for name, value in given.items():
        if name not in known and all(a.kind != "kwargs" for a in signature):
            raise InputError(f"{program} has no input '{name}'; it was captured with {', '.join(captured)}")
        default = known.get(name, REQUIRED)
        if not (value is default or (type(value) is type(default) and isinstance(value, _PLAIN) and value == default)):
            was = "was not given" if default is REQUIRED else f"had its default {default!r}"
            raise InputError(
                f"input '{name}' of {program} {was} when it was captured; capture it again with this input"
            )
    return tuple(values[name] for name in captured[:positional]), {name: values[name] for name in keywords}


def _named(program: str, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if len(args) > len(names):
        raise InputError(
            f"{program} takes {len(names)} inputs by position ({', '.join(names)}), got {len(args)}; pass the others by name"
        )
    by_position = dict(zip(names, args, strict=False))
    if twice := [name for name in by_position if name in kwargs]:
        raise InputError(f"input '{twice[0]}' of {program} is given by position and by name; give it once")
    return {**by_position, **kwargs}


def encode(signature: Signature) -> list[list[Any]]:
    """Return the JSON form."""
    return [[a.name, a.kind] if a.default is REQUIRED else [a.name, a.kind, a.default] for a in signature]


def decode(data: Sequence[Sequence[Any]]) -> Signature:
    """Return what `encode` wrote."""
    return tuple(Argument(str(name), str(kind), *default) for name, kind, *default in data)
