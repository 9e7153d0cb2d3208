"""Where in the user's code an operator is called: the text of a node's ``stack_trace``."""

from __future__ import annotations

import sys
import traceback
from types import CodeType

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
