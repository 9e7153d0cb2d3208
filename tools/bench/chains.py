"""Graphs of any length, and how the analysis grows with them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ...frontends.capture import capture
from ...graph.depgraph import depgraph
from ...graph.program import Program, get_tensor


class ResidualBlock(nn.Module):
    """A convolution block and an attention block, both residual: one channel axis runs through every block of a chain."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.LayerNorm(width)
        self.conv1, self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, width, height, width]`` to the same shape."""
        x = x + self.conv2(nn.functional.silu(self.conv1(self.norm1(x))))
        tokens = x.flatten(2).transpose(1, 2)
        y = self.norm2(tokens)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + (tokens + self.out(y)).transpose(1, 2).unflatten(2, x.shape[2:])


def chain(nodes: int) -> Program:
    """Return a program of at least ``nodes`` nodes on the meta device.

    One captured block is repeated, each time with parameters of its own, between two convolutions that leave the
    channels of the chain free.
    """
    with torch.device("meta"):
        block = capture(ResidualBlock(), (torch.empty(2, 32, 8, 8),), dynamic={})
        first = capture(nn.Conv2d(3, 32, 1), (torch.empty(2, 3, 8, 8),), dynamic={})
        last = capture(nn.Conv2d(32, 3, 1), (torch.empty(2, 32, 8, 8),), dynamic={})
    graph, root = Graph(), nn.Module()
    value = graph.node_copy(next(n for n in first.nodes if n.op == "placeholder"))
    value = _append(graph, root, first, value, "first")
    blocks = 0
    while len(graph.nodes) < nodes - sum(1 for _ in last.nodes):
        value = _append(graph, root, block, value, f"block{blocks}")
        blocks += 1
    value = _append(graph, root, last, value, "last")
    graph.output((value,)).meta["val"] = (value.meta["val"],)
    return Program(
        GraphModule(root, graph), first.inputs, first.in_spec, pytree.tree_structure(0), first.example, "chain"
    )


def _append(graph: Graph, root: nn.Module, block: Program, value: Node, prefix: str) -> Node:
    """Copy the block's nodes behind ``value``; return the node of its result."""
    env: dict[Node, Any] = {}
    owner = nn.Module()
    root.add_module(prefix, owner)
    for node in block.nodes:
        if node.op == "placeholder":
            env[node] = value
        elif node.op == "output":
            return env[node.args[0][0]]  # type: ignore[index]
        elif node.op == "get_attr":
            tensor = get_tensor(block.graph_module, str(node.target))
            assert tensor is not None
            name = str(node.target).replace(".", "_")
            owner.register_parameter(name, nn.Parameter(torch.empty_like(tensor)))
            env[node] = graph.get_attr(f"{prefix}.{name}")
            env[node].meta = dict(node.meta)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    raise AssertionError("a graph has an output")


def analysis_seconds(program: Program, repeats: int) -> float:
    """Return the median CPU seconds of the coupling analysis with its groups and what is frozen."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        graph = depgraph(program)
        assert graph.groups and graph.frozen
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


@dataclass(frozen=True)
class Fit:
    """Seconds against nodes: ``slope`` microseconds a node, ``r2`` of the line, ``exponent`` of the power law."""

    slope: float
    r2: float
    exponent: float


def fit(nodes: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Fit a line and a power law by least squares."""
    x, y = np.asarray(nodes, dtype=float), np.asarray(seconds, dtype=float)
    slope, offset = np.polyfit(x, y, 1)
    residual = float(((y - slope * x - offset) ** 2).sum())
    exponent = np.polyfit(np.log(x), np.log(y), 1)[0]
    return Fit(float(slope) * 1e6, 1 - residual / float(((y - y.mean()) ** 2).sum()), float(exponent))
