"""What a trace may change of a module by running it: attributes, and what their containers hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (list, dict, set, deque)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[list[Any]]:
    """Put attributes of the modules back as they were, and what lists, dicts, sets and deques in them hold.

    Yields:
        A list to which is added, in the end, what was not there before.
    """
    before = [(found, found.copy()) for found in _containers(model)]
    new: list[Any] = []
    try:
        yield new
    finally:
        for container, contents in before:
            if not _same(container, contents):
                old = set(map(id, _items(contents)))
                new += [item for item in _items(container) if id(item) not in old]
                _refill(container, contents)


def _containers(model: nn.Module) -> list[Any]:
    """Return the attributes of every module, registered or not, and the containers inside of them."""
    found: dict[int, Any] = {}
    todo: list[Any] = [model]
    while todo:
        value = todo.pop()
        if isinstance(value, tuple):
            todo += value
            continue
        container = vars(value) if isinstance(value, nn.Module) else value
        if isinstance(container, _CONTAINERS) and id(container) not in found:
            found[id(container)] = container
            todo += _items(container)
    return list(found.values())


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _same(container: Any, contents: Any) -> bool:
    """Whether a container still holds the objects that it held."""
    if isinstance(container, set):
        return container == contents
    if isinstance(container, dict) and list(container) != list(contents):
        return False
    now, before = _items(container), _items(contents)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if isinstance(container, (list, deque)) else container.update(contents)
