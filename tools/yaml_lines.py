"""Strict YAML with line numbers: one document, no repeated keys, no tags, plain data only.

Scalars follow YAML 1.2: ``1e-4`` is a number, and ``on``, ``yes`` and ``0777`` are not what YAML 1.1 made of them.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from ..graph.errors import first_line

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_NAMES = {"": None, "~": None, "null": None, "true": True, "false": False}


class YamlError(ValueError):
    """The text is no plain YAML document.

    Attributes:
        line: Where, from 1.
    """

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def read_yaml(text: str) -> tuple[Any, dict[Path, int]]:
    """Read one document.

    Args:
        text: YAML.

    Returns:
        The data, of dicts, lists, text, numbers, truth values and None; and the line (from 1) of every value in it,
        by the path of keys and positions that leads there. A mapping's entry is on the line of its key.

    Raises:
        YamlError: The text is malformed, has several documents, repeats a key, or carries a tag.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        message = " ".join(str(part) for part in (err.context, err.problem) if part)
        raise YamlError(message, mark.line + 1 if mark else 1) from None
    except yaml.YAMLError as err:  # characters that YAML forbids have no line
        raise YamlError(first_line(err), 1) from None
    lines: dict[Path, int] = {(): 1}
    return (None if node is None else _data(node, (), lines, ())), lines


def line_of(lines: dict[Path, int], path: Path) -> int:
    """Return the line of ``path``, or of the innermost thing around it that has one."""
    while path not in lines:
        path = path[:-1]
    return lines[path]


def _data(node: yaml.Node, path: Path, lines: dict[Path, int], around: tuple[yaml.Node, ...]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if node in around:
        raise YamlError("an alias refers to what contains it", line)
    if isinstance(node, yaml.MappingNode):
        _no_tag(node, "map")
        return _mapping(node, path, lines, (*around, node))
    if isinstance(node, yaml.SequenceNode):
        _no_tag(node, "seq")
        return [_data(item, (*path, i), lines, (*around, node)) for i, item in enumerate(node.value)]
    return _scalar(node)


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[Path, int], around: tuple[yaml.Node, ...]) -> Any:
    out: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise YamlError("a key must be text or a whole number", line)
        if key in out:
            raise YamlError(f"the key {key!r} is repeated", line)
        lines.setdefault((*path, key), line)
        out[key] = _data(value_node, (*path, key), lines, around)
    return out


def _scalar(node: Any) -> Any:
    # A plain scalar's tag is a guess by YAML 1.1, which is made again here; any other was written by hand.
    if node.style is not None:
        _no_tag(node, "str")
        return node.value
    if node.tag.rpartition(":")[2] not in {"str", "int", "float", "bool", "null", "timestamp", "value", "merge"}:
        _no_tag(node, "str")
    text = node.value
    if text.lower() in _NAMES:
        return _NAMES[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)


def _no_tag(node: yaml.Node, kind: str) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        raise YamlError(f"tags such as {node.tag!r} are not allowed in a recipe", node.start_mark.line + 1)
