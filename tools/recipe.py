"""Recipes: a YAML file that names a model, the passes to apply, what to export and how to check it.

    version: 1
    model: builtin:digits-ddpm
    passes:
      - remove-channels: {ratio: 0.3, scope: global}
      - eliminate-dead-code
    export: {onnx: true}

Reading is strict: an unknown key, a repeated key or a value of the wrong type is an error with its line, and options of
passes are checked against the passes themselves. `Recipe.to_yaml` writes every default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..passes.base import Pass
from ..passes.options import OptionError, build, make, unknown
from ..passes.text import parse
from .recipe_schema import SWITCHES, Recipe, RecipeError
from .recipe_set import Origin, override
from .yaml_lines import YamlError, line_of, read_yaml

SUFFIXES = (".yaml", ".yml")


def shipped() -> dict[str, Any]:
    """Return the recipes that ship with the package, by short name."""
    return _walk(files("graphwright.recipes"), "")


def _walk(folder: Any, prefix: str) -> dict[str, Any]:
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir() and not entry.name.startswith(("_", ".")):
            found |= _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(SUFFIXES[0]):
            found[prefix + entry.name.removesuffix(SUFFIXES[0])] = entry
    return found


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or by the short name of a shipped one.

    Args:
        name: ``path/to/recipe.yaml`` or, for example, ``demo``.
        overrides: ``key=value`` with the path to a key, such as ``passes.remove-channels.ratio=0.5``.

    Raises:
        RecipeError: There is no such recipe, or it is wrong; names the file and the line.
    """
    path = Path(name)
    if path.suffix in SUFFIXES or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise RecipeError(f"cannot read the recipe {name}: {getattr(err, 'strerror', None) or err}") from None
        return read_recipe(text, name, overrides)
    known = shipped()
    if name not in known:
        raise RecipeError(unknown("no recipe is called", name, known) + "; a path ends in .yaml")
    return read_recipe(known[name].read_text(encoding="utf-8"), name, overrides)


def read_recipe(source: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text.

    Raises:
        RecipeError: It is wrong; names ``name`` and the line.
    """
    try:
        data, lines = read_yaml(source)
    except YamlError as err:
        raise RecipeError(f"{name}:{err.line}: {err}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{name}:1: a recipe is a mapping with the keys model, passes, ..., got {data!r}")
    origin: Origin = {}
    for text in overrides:
        override(data, text, origin)
    return _built(data, name, lines, origin)


def from_data(data: dict[str, Any], name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Make a recipe from plain data, as the command line does for ``--pass``.

    Raises:
        RecipeError: It is wrong.
    """
    origin: Origin = {}
    for text in overrides:
        override(data, text, origin)
    return _built(data, name, {(): 0}, origin)


def _built(data: dict[str, Any], name: str, lines: Mapping[Any, int], origin: Origin) -> Recipe:
    try:
        values = dict(_sections(data))
        values["passes"] = _passes(data.get("passes", []))
        for key in ("calibration", "training", "sampling", "samples"):
            if isinstance(values.get(key), str):
                values[key] = {"factory": values[key]}
        recipe = build(Recipe, values, "a recipe", "key")
    except OptionError as err:
        blamed = next((text for path, text in origin.items() if err.path[: len(path)] == path), None)
        line = line_of(dict(lines), err.path)
        place = blamed or (f"{name}:{line}" if line else name)
        raise RecipeError(f"{place}: {err}") from None
    object.__setattr__(recipe, "name", Path(name).name.removesuffix(SUFFIXES[0]))
    return recipe


def _sections(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace the switches ``true`` and ``false`` by what they stand for."""
    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for path in SWITCHES:
        *around, last = path
        section: Any = out
        for key in around:
            section = section.get(key)
        if not isinstance(section, dict) or last not in section:
            continue
        value = section[last]
        if not isinstance(value, Mapping | bool):
            raise OptionError(f"{last} must be true, false or a mapping of options, got {value!r}", path)
        section[last] = {} if value is True else None if value is False else value
    return out


def _passes(items: Any) -> tuple[Pass, ...]:
    if not isinstance(items, list):
        raise OptionError(f"passes must be a list, got {items!r}", ("passes",))
    return tuple(_pass(item, i) for i, item in enumerate(items))


def _pass(item: Any, i: int) -> Pass:
    if isinstance(item, str):
        try:
            return make(*parse(item))
        except OptionError as err:
            raise OptionError(str(err), ("passes", i)) from None
    if not isinstance(item, Mapping) or len(item) != 1:
        raise OptionError(f"a pass is its name, or one 'name: {{options}}', got {item!r}", ("passes", i))
    ((name, values),) = item.items()
    try:
        return make(str(name), {} if values is None else values)
    except OptionError as err:
        raise err.below("passes", i, name) from None
