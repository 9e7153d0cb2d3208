"""``--set key=value``: change plain recipe data before it is checked."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ..passes.options import unknown
from ..passes.text import OptionError, parse
from .recipe_schema import RecipeError
from .yaml_lines import YamlError, read_yaml

Origin = dict[tuple[str | int, ...], str]


def override(data: dict[str, Any], text: str, origin: Origin) -> None:
    """Apply one ``key=value`` to plain recipe data, in place, making sections that are not there.

    Args:
        data: What the recipe's YAML holds.
        text: The key is a path, ``passes.remove-channels.ratio`` or ``passes.0.ratio``; the value is YAML.
        origin: Gets the path with the text, so that errors can name the option instead of a line.

    Raises:
        RecipeError: The text is malformed or names something that is no section.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise RecipeError(f"--set takes key=value, such as passes.remove-channels.ratio=0.5, got {text!r}")
    try:
        parsed, _ = read_yaml(value)
    except YamlError as err:
        raise RecipeError(f"--set {text}: {err}") from None
    target: Any = data
    path: list[str | int] = []
    *around, last = key.split(".")
    for part in around:
        target = _step(target, part, path, text)
    if isinstance(target, list):
        last = _position(target, last, path, text)
        if isinstance(last, str):
            raise RecipeError(f"--set {text}: there is no pass {last!r} to set")
        target[last] = parsed
    elif isinstance(target, dict):
        target[last] = parsed
    else:
        raise RecipeError(f"--set {text}: {'.'.join(map(str, path))} is no section, but {target!r}")
    origin[(*path, last)] = f"--set {text}"


def _step(target: Any, part: str, path: list[str | int], text: str) -> Any:
    """Return what ``part`` names inside ``target``, and record the way in ``path``."""
    if isinstance(target, list):
        i = _position(target, part, path, text)
        if isinstance(i, str):
            names = [next(iter(p)) if isinstance(p, dict) and p else p for p in target]
            raise RecipeError(f"--set {text}: " + unknown("the recipe has no pass", part, map(str, names)))
        path.append(i)
        if isinstance(target[i], str):
            # The text form, `name` or `name{option=value}`, becomes the mapping that it stands for.
            with suppress(OptionError):  # malformed text is reported when the recipe is read
                target[i] = dict([parse(target[i])])
        inside = target[i]
        if isinstance(inside, dict) and len(inside) == 1 and path[0] == "passes":
            name = next(iter(inside))
            path.append(name)
            if inside[name] is None:
                inside[name] = {}
            return inside[name]
        return inside
    if not isinstance(target, dict):
        raise RecipeError(f"--set {text}: {'.'.join(map(str, path))} is no section, but {target!r}")
    path.append(part)
    if target.get(part) is None or target[part] is True or target[part] is False:
        target[part] = {}
    return target[part]


def _position(items: list[Any], part: str, path: list[str | int], text: str) -> int | str:
    if part.isdecimal():
        if int(part) >= len(items):
            raise RecipeError(f"--set {text}: {'.'.join(map(str, path))} has {len(items)} entries, counted from 0")
        return int(part)
    for i, item in enumerate(items):
        named = item.partition("{")[0].strip() if isinstance(item, str) else item
        if named == part or (isinstance(named, dict) and part in named):
            return i
    return part
