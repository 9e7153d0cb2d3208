"""Options of passes from plain data, checked against the types of dataclass fields.

Recipes and the command line configure passes without Python; both come through here. Types and defaults are those of
the dataclass; nothing is written down twice.

    make("remove-channels", {"ratio": 0.5}) == RemoveChannels(ratio=0.5)
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..graph.errors import unknown as unknown
from . import registry
from .text import OptionError, default_of, qualified_name, show_value

if TYPE_CHECKING:
    from .base import Pass


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    Attributes:
        name: Of the dataclass field.
        type: In words.
        default: In the text form; None where a value must be given.
        about: What the class says of it under ``Attributes:``, in one line.
    """

    name: str
    type: str
    default: str | None
    about: str = ""


def options(cls: type) -> tuple[Option, ...]:
    """Return the options of a pass (or of any dataclass) in the order of their declaration."""
    hints, about = get_type_hints(cls), _attributes(cls)
    return tuple(
        Option(
            f.name,
            type_text(hints[f.name]),
            None if default_of(f) is MISSING else show_value(default_of(f)),
            about.get(f.name, ""),
        )
        for f in fields(cls)
        if f.init
    )


def _attributes(cls: type) -> dict[str, str]:
    """Return what a google docstring says under ``Attributes:``, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _section(base)
    return found


def _section(cls: type) -> dict[str, str]:
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break  # the next section
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry.group(1)
            found[name] = entry.group(2)
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def make(name: str, values: Mapping[str, Any]) -> Pass:
    """Make the pass registered as ``name`` from plain data.

    Raises:
        OptionError: There is no such pass or option, a value has the wrong type, or the pass refuses it.
    """
    try:
        cls = registry.load(name)
    except ValueError as err:
        raise OptionError(str(err)) from None
    return build(cls, values, name)


def build(cls: type, values: Any, what: str, noun: str = "option") -> Any:
    """Make the dataclass ``cls`` from a mapping of plain data, with every value converted to its field's type.

    Args:
        cls: The dataclass. Fields that are dataclasses take mappings in turn.
        values: Field values by name.
        what: What the errors call the thing.
        noun: What they call its entries.

    Raises:
        OptionError: As for `make`.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"{what} takes a mapping of options, got {_got(values)}")
    known = {f.name: f for f in fields(cls) if f.init}
    hints = get_type_hints(cls)
    for key in values:
        if key not in known:
            raise OptionError(unknown(f"{what} has no {noun}", key, known), (key,))
    missing = [name for name, f in known.items() if default_of(f) is MISSING and name not in values]
    if missing:
        raise OptionError(f"{what} needs the {noun} {missing[0]!r} ({type_text(hints[missing[0]])})")
    converted = {key: convert(value, hints[key], key) for key, value in values.items()}
    try:
        return cls(**converted)
    except OptionError:
        raise
    except ValueError as err:
        # A dataclass that checks itself starts its message with the field it blames.
        first = re.match(r"\w+", str(err))
        path = (first.group(),) if first and first.group() in values else ()
        raise OptionError(f"{what}: {err}", path) from None


def convert(value: Any, hint: Any, name: str) -> Any:
    """Return plain ``value`` as an instance of the type ``hint``.

    Whole numbers become floats where a float is wanted, lists become tuples, mappings become dataclasses. Nothing else
    is converted: the text ``"3"`` is no number, and 1 is no truth value.

    Raises:
        OptionError: It is of another type; names the option, the type and the value.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise OptionError(f"{name} must be one of {', '.join(map(str, args))}, got {value!r}", (name,))
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, hint, name)
    if is_dataclass(hint) and isinstance(hint, type):
        try:
            return build(hint, value, name)
        except OptionError as err:
            raise err.below(name) from None
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, (Sequence, Mapping))):
        return _convert_many(value, hint, origin, args, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, float, str) and type(value) is hint:
        return value
    if hint is types.NoneType and value is None:
        return None
    raise OptionError(f"{name} must be {type_text(hint)}, got {_got(value)}", (name,))


def _convert_union(value: Any, args: tuple[Any, ...], hint: Any, name: str) -> Any:
    deeper: OptionError | None = None
    for arg in args:
        try:
            return convert(value, arg, name)
        except OptionError as err:
            # A mapping given for a structured alternative is judged by that alternative, not by the union.
            if len(err.path) > 1 or (isinstance(value, Mapping) and is_dataclass(arg)):
                deeper = err
    if deeper is not None:
        raise deeper
    raise OptionError(f"{name} must be {type_text(hint)}, got {_got(value)}", (name,))


def _convert_many(value: Any, hint: Any, origin: Any, args: tuple[Any, ...], name: str) -> Any:
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise OptionError(f"{name} must be {type_text(hint)}, got {_got(value)}", (name,))
        return {
            _inside(key, args[0], f"a key of {name}", name, key): _inside(item, args[1], f"{name}.{key}", name, key)
            for key, item in value.items()
        }
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise OptionError(f"{name} must be {type_text(hint)}, got {_got(value)}", (name,))
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise OptionError(f"{name} must be {type_text(hint)}, got {len(value)} items", (name,))
        kinds: Iterable[Any] = args
    else:
        kinds = [args[0]] * len(value)
    return tuple(
        _inside(item, kind, f"{name}[{i}]", name, i) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _inside(value: Any, hint: Any, label: str, *path: str | int) -> Any:
    try:
        return convert(value, hint, label)
    except OptionError as err:
        raise OptionError(str(err), (*path, *err.path[1:])) from None


def type_text(hint: Any) -> str:
    """Return a type as a person would write it: ``number``, ``list of text``, ``one of local, global``."""
    origin, args = get_origin(hint), get_args(hint)
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    if hint in simple:
        return simple[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        # A function cannot be written down: what reads this can give the others.
        return " or ".join(type_text(a) for a in args if get_origin(a) is not Callable)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {_plural(args[0])} to {_plural(args[1])}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} items"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list of {_plural(args[0])}"
    return "a mapping of options" if is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def _plural(hint: Any) -> str:
    many = {bool: "truth values", int: "whole numbers", float: "numbers", str: "text"}
    return many.get(hint) or type_text(hint).removeprefix("a ")


def _got(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"the text {value!r}" if isinstance(value, str) else show_value(value)


def plain(value: Any) -> dict[str, Any]:
    """Return every option of a pass as plain data that `make` reads, defaults included.

    Raises:
        OptionError: One is a function, which only Python can give.
    """
    return {f.name: _plain(getattr(value, f.name), f.name) for f in fields(value) if f.init}


def _plain(value: Any, name: str) -> Any:
    if callable(value):
        raise OptionError(
            f"{name} is the function {qualified_name(value)}, and recipes take names only: give one of the names, or "
            "apply the pass with a Pipeline from Python",
            (name,),
        )
    if is_dataclass(value):
        return plain(value)
    if isinstance(value, Mapping):
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item, name) for item in value]
    return value


__all__ = ["Option", "OptionError", "build", "convert", "make", "options", "plain", "type_text", "unknown"]
