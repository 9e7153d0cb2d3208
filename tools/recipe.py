"""Recipes: a YAML file that names a model, the passes to apply, what to export and how to check it.

    version: 1
    model: builtin:digits-ddpm
    passes:
      - remove-channels: {ratio: 0.3, scope: global}
      - eliminate-dead-code
    export: {onnx: true}

Reading is strict: an unknown key, a repeated key or a value of the wrong type is an error with its line, and options of
passes are checked against the passes themselves. `to_yaml` writes a recipe with every default filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from ..graph.errors import GraphwrightError
from ..passes.base import Pass
from ..passes.options import OptionError, build, make, plain, unknown
from ..passes.text import parse
from .yaml_lines import YamlError, line_of, read_yaml

VERSION = 1
SUFFIXES = (".yaml", ".yml")
# Sections that are written `true` for their defaults and `false` for off.
SWITCHES = (("export", "onnx"), ("export", "torchscript"), ("samples",), ("measure",))


class RecipeError(GraphwrightError):
    """A recipe does not exist, is malformed, or asks for something unknown."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where gradients come from.

    Attributes:
        factory: ``digits-ddpm``, or ``package.module:factory``; called with `options` it returns ``(loss, batches)``,
            where ``loss(program, batch)`` is a scalar tensor.
        options: Keyword arguments of the factory.
    """

    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """An ONNX export.

    Attributes:
        opset: ONNX operator set; null lets the exporter choose by what the graph holds.
        fp16: Convert weights and computation to half precision.
        providers: ONNX Runtime execution providers to run on, best first; null takes the best that is there.
        original: Export the model before the passes as well, to compare speed and samples.
    """

    opset: int | None = None
    fp16: bool = False
    providers: tuple[str, ...] | None = None
    original: bool = True


@dataclass(frozen=True, kw_only=True)
class TorchscriptExport:
    """A TorchScript export; it has no options."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to export; null where nothing is."""

    onnx: OnnxExport | None = None
    torchscript: TorchscriptExport | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """How exports are compared with the program.

    Attributes:
        tolerance: Largest allowed difference of an output, relative to its largest magnitude.
        second_shape: Compare at other sizes of the dynamic dimensions too: true (batch plus 1, others doubled), false,
            or the sizes by the dimension's name.
    """

    tolerance: float = 1e-3
    second_shape: bool | Mapping[str, int] = True

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Pictures drawn with the original and the rewritten model, for ``builtin:digits-ddpm``.

    Attributes:
        count: Pictures by each model; distances of fewer than 256 say little.
        steps: Denoising steps.
        seed: Seed of the starting noise, the same for both models.
        shown: How many of them the report shows.
    """

    count: int = 256
    steps: int = 25
    seed: int = 0
    shown: int = 32

    def __post_init__(self) -> None:
        for name, low in (("count", 2), ("steps", 1), ("shown", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How latency is measured.

    Attributes:
        runs: Timed runs of each model, interleaved; the median counts.
        threads: Threads of PyTorch and ONNX Runtime; null takes what they choose.
        batch: Size of the dynamic batch dimension; null takes the example's.
    """

    runs: int = 20
    threads: int | None = 1
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("runs", "threads", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, wholly described.

    Attributes:
        model: ``builtin:NAME``, a directory, ``package.module:factory``.
        version: Of the recipe format.
        dtype: Convert the model's floating-point tensors, and inputs, to this; null leaves them.
        seed: Of everything random that has no seed of its own.
        inputs: Example inputs by name, where the model's own do not do.
        dynamic: Names of dimensions that may vary, by input and dimension; null is the batch alone.
        calibration: For criteria that need gradients.
        passes: In order.
        export: What to export.
        check: How exports are compared.
        samples: Pictures to draw.
        measure: How to measure latency; null to leave it out.
        name: The recipe's short name; not a key of the file.
    """

    model: str
    version: int = VERSION
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    seed: int = 0
    inputs: Mapping[str, Any] | None = None
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    calibration: Calibration | None = None
    passes: tuple[Any, ...] = ()
    export: Export = field(default_factory=Export)
    check: Check = field(default_factory=Check)
    samples: Samples | None = None
    measure: Measure | None = field(default_factory=Measure)
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version must be {VERSION}, the one this release reads, got {self.version}")

    def to_data(self) -> dict[str, Any]:
        """Return plain data with every default filled in; `read_recipe` reads it back."""
        data = plain(replace(self, passes=()))
        data["passes"] = [{step.name: plain(step)} for step in self.passes]
        for *around, last in SWITCHES:
            section = data
            for key in around:
                section = section[key]
            if section[last] is None:
                section[last] = False
        ordered = {"version": data.pop("version"), **data}
        return ordered

    def to_yaml(self) -> str:
        """Return the YAML of `to_data`."""
        return yaml.safe_dump(self.to_data(), sort_keys=False, allow_unicode=True, width=100)


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


def read_recipe(text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text.

    Raises:
        RecipeError: It is wrong; names ``name`` and the line.
    """
    try:
        data, lines = read_yaml(text)
    except YamlError as err:
        raise RecipeError(f"{name}:{err.line}: {err}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{name}:1: a recipe is a mapping with the keys model, passes, ..., got {data!r}")
    origin: dict[tuple[str | int, ...], str] = {}
    for override in overrides:
        _override(data, override, origin)
    return _built(data, name, lines, origin)


def from_data(data: dict[str, Any], name: str) -> Recipe:
    """Make a recipe from plain data, as the command line does for ``--pass``."""
    return _built(data, name, {(): 0}, {})


def _built(data: dict[str, Any], name: str, lines: Mapping[Any, int], origin: Mapping[Any, str]) -> Recipe:
    try:
        values = dict(_sections(data))
        values["passes"] = _passes(data.get("passes", []))
        if isinstance(values.get("calibration"), str):
            values["calibration"] = {"factory": values["calibration"]}
        recipe = build(Recipe, values, "a recipe")
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


def _override(data: dict[str, Any], text: str, origin: dict[tuple[str | int, ...], str]) -> None:
    """Apply one ``key=value`` to plain recipe data, making sections that are not there."""
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
            target[i] = {target[i]: {}}
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
        if item == part or (isinstance(item, dict) and part in item):
            return i
    return part
