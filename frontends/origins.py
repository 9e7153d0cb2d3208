"""Where an operator is called: the lines of the user's code, and the modules that are running."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from torch import nn
from torch.fx.experimental.symbolic_shapes import uninteresting_files


class SourceLines:
    """Looks up each line once, not once a node: the nodes of a layer share all but a few of their frames."""

    def __init__(self) -> None:
        self._known: dict[tuple[CodeType, int], str] = {}
        self._dropped = uninteresting_files()

    def text(self) -> str:
        """Return the frames of the caller in a ``forward`` outside of torch, outermost first, as torch writes them."""
        found: list[str] = []
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "forward":
                key = frame.f_code, frame.f_lasti
                if key not in self._known:
                    self._known[key] = self._line(frame.f_code, frame.f_lineno)
                found.append(self._known[key])
            frame = frame.f_back
        return "".join(reversed(found)).strip()

    def _line(self, code: CodeType, number: int) -> str:
        if code.co_filename in self._dropped:
            return ""
        return traceback.format_list([traceback.FrameSummary(code.co_filename, number, code.co_name)])[0]


@contextmanager
def modules_entered(model: nn.Module, entered: dict[str, tuple[str, str]]) -> Iterator[None]:
    """Keep in ``entered`` the modules that are running, outermost first, as `torch.export` names them."""
    known: dict[nn.Module, tuple[str, str]] = {}
    calls: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        kind = type(module)
        known[module] = name, f"{kind.__module__}.{kind.__qualname__}"
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self not in known:
            return original(self, *args, **kwargs)
        again = calls[self] = calls.get(self, -1) + 1
        key = f"L__self__{known[self][0]}" + f"@{again}" * bool(again)
        entered[key] = known[self]
        try:
            return original(self, *args, **kwargs)
        finally:
            del entered[key]

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = original
