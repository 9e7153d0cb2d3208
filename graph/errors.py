"""Errors that say what, where, expected, got and what to do."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

from torch.fx import Node

_LISTED = 24  # names in a message


class GraphwrightError(Exception):
    """Base of every error this library raises on purpose."""


class CaptureError(GraphwrightError):
    """The model could not be turned into a Program."""


class LoadError(GraphwrightError):
    """There is no such model, or it cannot be loaded."""


class InputError(GraphwrightError, TypeError):
    """A Program was called with inputs it was not captured for."""


class PreconditionError(GraphwrightError):
    """The user's program is outside the domain of what was asked; the message says what to do."""


class VerificationError(GraphwrightError):
    """A program is inconsistent with itself: a bug of the pass that left it so."""

    def __init__(self, message: str, node: Node | None = None) -> None:
        super().__init__(message if node is None else f"{message}\n  at {where(node)}")
        self.node = node


class WriteBackError(GraphwrightError):
    """The caller's own class, with the program's tensors in it, does not compute what the program computes."""


class ArtifactError(GraphwrightError):
    """A saved artifact is missing, damaged, or of a kind that this version does not read."""


class ExportError(GraphwrightError):
    """A program could not be exported, or the exported file does not compute what the program computes."""


class ProviderError(GraphwrightError):
    """ONNX Runtime is not installed as it should be, or a requested execution provider does not work."""


def module_path(node: Node) -> tuple[str, str]:
    """Return the fully qualified name and the type of the innermost module that ``node`` came from.

    Placeholders and ``get_attr`` nodes carry no origin of their own; their first user's is taken.
    """
    origin = node if node.meta.get("nn_module_stack") else next(iter(node.users), node)
    stack = origin.meta.get("nn_module_stack") or {}
    if not stack:
        return "", "?"
    fqn, kind = list(stack.values())[-1][:2]
    return fqn, kind if isinstance(kind, str) else kind.__name__


def source_line(node: Node) -> str:
    """Return the innermost frame of the user's code (not of torch) that made ``node``, or an empty string."""
    origin = node if "stack_trace" in node.meta else next(iter(node.users), node)
    frames = [line.strip() for line in (origin.meta.get("stack_trace") or "").splitlines()]
    user = [line for line in frames if line.startswith("File ") and f"{os.sep}torch{os.sep}" not in line]
    return user[-1] if user else ""


def where(node: Node) -> str:
    """Say which node, in which submodule, from which user source line."""
    fqn, kind = module_path(node)
    return f"%{node.name} = {node.target} in {fqn or '<root>'} ({kind}), {source_line(node) or 'source unknown'}"


def first_line(err: BaseException) -> str:
    """Return the first line of an error's message that says something, or the name of its class."""
    return next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__)


def unknown(message: str, name: object, known: Iterable[object]) -> str:
    """Return ``message 'name'; did you mean 'nearest'?``, or the known names where none is near."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), names, 1)
    if near:
        return f"{message} {name!r}; did you mean {near[0]!r}?"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{message} {name!r}; known: {', '.join(names[:_LISTED]) or 'none'}{more}"
