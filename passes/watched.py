"""A program that remembers its calls, with values from inside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..graph.program import Program, ProgramModule


class Watched(ProgramModule):
    """A program as a module that also remembers the inputs, outputs and some inner values of its last call.

    Args:
        program: Whose tensors it shares.
        nodes: Names of the nodes whose values are kept.
    """

    def __init__(self, program: Program, nodes: Sequence[str] = ()) -> None:
        work = program.copy()
        super().__init__(work)
        graph = work.graph_module.graph
        found = {node.name: node for node in graph.nodes}
        output = graph.output_node()
        results = output.args[0]
        self.results = len(results) if isinstance(results, (tuple, list)) else 1
        own = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        output.args = ((*own, *(found[name] for name in nodes)),)
        work.graph_module.recompile()
        self.calls: list[tuple[Any, Any, tuple[Tensor, ...]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program: Program = self.__dict__["program"]
        flat = program.graph_module(*program.flatten(*args, **kwargs))
        result = program.unflatten(flat[: self.results])
        self.calls.append(((args, kwargs), result, tuple(flat[self.results :])))
        return result
