"""Shortcuts through ``torch.export``: the same graph without work whose result is thrown away.

Each replaces a private function of torch, for the time of one export, by one that gives the same, or nothing where
nobody reads the result. One whose place the installed torch does not have is left out: that export takes longer.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import CodeType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch


class Shortcut(NamedTuple):
    """A function of torch to replace.

    Attributes:
        module: Where it is looked up when it is called.
        name: Its name there.
        make: Returns the replacement, given the function.
    """

    module: str
    name: str
    make: Callable[[Any], Any]


@contextmanager
def quick_trace() -> Iterator[None]:
    """Export with the shortcuts that the installed torch has a place for."""
    with ExitStack() as stack:
        for shortcut in SHORTCUTS:
            try:
                owner = import_module(shortcut.module)
                replacement = shortcut.make(getattr(owner, shortcut.name))
            # Private names come and go between versions of torch.
            except (ImportError, AttributeError):
                continue
            stack.enter_context(patch.object(owner, shortcut.name, replacement))
        yield


def _frames(_original: Any) -> Any:
    """Return what stands in for ``CapturedTraceback``: it looks up each source line once, not once a node.

    A node is made about seventy frames deep, and the nodes of a layer share all but a few of them.
    """
    from torch.fx.experimental.symbolic_shapes import uninteresting_files

    known: dict[tuple[int, int], traceback.FrameSummary | None] = {}
    codes: list[CodeType] = []  # kept alive, so that no other gets the id of one
    dropped = uninteresting_files()

    def summary_of(code: CodeType, line: int) -> traceback.FrameSummary | None:
        codes.append(code)
        # torch leaves out these files too; its search for the first forward sees them.
        if code.co_filename in dropped and code.co_name != "forward":
            return None
        return traceback.FrameSummary(code.co_filename, line, code.co_name)

    class Frames:
        @staticmethod
        def extract(*_args: Any, **_kwargs: Any) -> Frames:
            return Frames()

        def summary(self) -> traceback.StackSummary:
            found = traceback.StackSummary()
            frame = sys._getframe(1)
            while frame is not None:
                key = id(frame.f_code), frame.f_lasti
                if key not in known:
                    known[key] = summary_of(frame.f_code, frame.f_lineno)
                summary = known[key]
                if summary is not None:
                    found.append(summary)
                frame = frame.f_back
            found.reverse()
            return found

    return Frames


def _nothing(_original: Any) -> Any:
    return lambda *_args, **_kwargs: None


def _by_type(original: Any) -> Any:
    """Return a function that asks the original once for each type."""
    known: dict[type, Any] = {}

    def node_type(tree: Any) -> Any:
        kind = type(tree)
        if kind not in known:
            known[kind] = original(tree)
        return known[kind]

    return node_type


def _where_unbacked(original: Any) -> Any:
    """Return what looks for symbols of unknown value only where the trace made one."""
    from torch._export.utils import _get_shape_env_from_gm
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def replace(gm: torch.fx.GraphModule) -> None:
        shapes = _get_shape_env_from_gm(gm)
        if shapes is None or any(free_unbacked_symbols(symbol) for symbol in shapes.var_to_range):
            original(gm)

    return replace


def _without_code(original: Any) -> Any:
    """Return what makes a graph module whose Python code is written when it is called, if ever."""
    from torch.fx._lazy_graph_module import _make_graph_module

    return lambda root, graph: _make_graph_module(root, graph)


SHORTCUTS = (
    Shortcut("torch.fx.proxy", "CapturedTraceback", _frames),
    # Shape and strides of a value, beside the value itself. Where sizes are symbols, torch asks for the memory format by
    # comparing them, which leaves conditions on sizes that the model's code does not have.
    Shortcut("torch.fx.experimental.proxy_tensor", "_extract_tensor_metadata", _nothing),
    Shortcut("torch.utils._pytree", "_get_node_type", _by_type),
    Shortcut("torch.export._trace", "_replace_unbacked_bindings", _where_unbacked),
    Shortcut("torch.export.exported_program", "_create_graph_module_for_export", _without_code),
)
