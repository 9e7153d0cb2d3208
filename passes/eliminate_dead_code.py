"""Eliminate dead code: nodes whose result nothing uses, and parameters that nothing reads any more.

    before: a = relu(x); b = gelu(x); return a
    after:  a = relu(x); return a

An operator that writes into its input stays, as its write may be seen elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..graph.program import Program
from .base import Context, Pass, PassResult
from .unread import drop_unread


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Erase every node without users that has no effect, and the parameters only they read."""

    name: ClassVar[str] = "eliminate-dead-code"
    applies_to_plans: ClassVar[bool] = True

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        before = len(program.tensors())
        erased = eliminate(program)
        return PassResult(erased > 0, {"nodes_removed": erased, "tensors_dropped": before - len(program.tensors())})


def eliminate(program: Program) -> int:
    """Erase the nodes that nothing uses and that have no effect, drop tensors nobody reads; return how many nodes."""
    gm = program.graph_module
    erased = 0
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and not has_effect(node):
            gm.graph.erase_node(node)
            erased += 1
    if erased:
        gm.delete_all_unused_submodules()
        drop_unread(gm)
    return erased


def has_effect(node: Node) -> bool:
    """Whether a node does something besides giving its result."""
    if node.op in ("placeholder", "output", "call_module", "call_method"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
