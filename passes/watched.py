"""A program that remembers its calls, with values from inside the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import PreconditionError
from ..graph.program import Program, ProgramModule
from .base import Context


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


def calibration_values(program: Program, nodes: Sequence[str], ctx: Context) -> Iterator[tuple[Tensor, ...]]:
    """Yield the values of the named nodes for every call of the program by ``ctx.loss`` on ``ctx.batches``.

    Raises:
        PreconditionError: There is no loss that calls the program, or no batch.
    """
    if ctx.loss is None or not ctx.batches:
        raise PreconditionError("activations need calibration: give Context(loss=..., batches=[...])")
    loss: Any = ctx.loss
    watched = Watched(program, nodes)
    for i, batch in enumerate(ctx.batches):
        with torch.no_grad():
            loss(watched, batch)
        if not watched.calls:
            raise PreconditionError("the calibration loss does not call the program that it is given")
        for _, _, values in watched.calls:
            yield values
        watched.calls.clear()
        ctx.report("calibration", i + 1, len(ctx.batches))
