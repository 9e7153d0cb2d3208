"""Remove dropout.

    before: y = dropout(x, 0.1, False); z = linear(y, w)
    after:  z = linear(x, w)

A dropout that is in training mode stays: it does something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..graph.program import Program
from .base import Context, Pass, PassResult, Skipped

aten = torch.ops.aten
TARGETS = (
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)


@dataclass(frozen=True)
class RemoveDropout(Pass):
    """Forward the input of every inference-mode dropout to its users."""

    name: ClassVar[str] = "remove-dropout"
    applies_to_plans: ClassVar[bool] = True

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        graph = program.graph_module.graph
        removed, skipped = 0, list[Skipped]()
        for target in TARGETS:
            for node in graph.find_nodes(op="call_function", target=target):
                x, p, train = node.args
                if (train and p != 0) or not isinstance(x, Node):
                    skipped.append(Skipped(node.name, "it is in training mode"))
                    continue
                node.replace_all_uses_with(x)
                graph.erase_node(node)
                removed += 1
        return PassResult(removed > 0, {"dropouts_removed": removed}, tuple(skipped))
