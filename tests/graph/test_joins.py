"""Skip connections and residual branches: how many, in which order, whatever the modules are called."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.joins import residual_joins, skip_joins
from graphwright.tools.zoo import ZOO


@cache
def captured(name: str) -> gw.Program:
    case = ZOO[name].build()
    return gw.capture(case.model, case.args, case.kwargs, case.dynamic)


# Each block of the encoder, each of its downsamplers, and the first convolution has a skip connection.
SKIPS = {
    "unet2d": 6,  # and those in tests/passes/test_cache_architectures_unet.py and _more.py
    "uvit": 1,
    "dit": 0,
    "pixart": 0,
    "sd3": 0,
    "flux": 0,
    "bert": 0,
}


@pytest.mark.parametrize("name", SKIPS)
def test_skip_connections_are_counted(name: str) -> None:
    joins = skip_joins(captured(name))
    assert [join.branch for join in joins] == list(range(SKIPS[name]))


# Attention and feed-forward of every block; a joint block has them for picture and text.
RESIDUALS = {"dit": "am" * 2, "pixart": "aam" * 2, "uvit": "am" * 3, "bert": "am" * 2, "llama_gqa": "am" * 2}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_branches_are_counted_and_told_apart(name: str) -> None:
    assert "".join(join.kind[0] for join in residual_joins(captured(name))) == RESIDUALS[name]


def test_joint_blocks_have_branches_for_both_streams() -> None:
    kinds = Counter(join.kind for join in residual_joins(captured("sd3")))
    assert kinds == {"attention": 3, "mlp": 3}  # the last block drops the text


class Turned(nn.Module):
    """A U-Net with the skip first in one concatenation, another dimension, and residuals added to the skips."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.d, self.e = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, residual: Tensor, time: Tensor) -> Tensor:
        first = self.a(x)
        second = self.b(first)
        deep = self.c(second)
        up = self.d(torch.cat([second + residual, deep], -1))
        table = torch.cat([time.sin(), time.cos()], -1)
        return self.e(torch.cat([up, first], -1)) * table


def test_order_of_operands_and_added_residuals_do_not_matter_and_tables_are_no_skips() -> None:
    program = gw.capture(Turned(), (torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 2)))
    first, second = skip_joins(program)
    assert (first.main.name, first.skip.name) == ("linear_3", "linear")
    assert (second.main.name, second.skip.name) == ("linear_2", "add")


class Gated(nn.Module):
    """A gate that depends on the condition alone stays outside of the branch; one that depends on the stream does not."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.f, self.g, self.own = nn.Linear(4, 4), nn.Linear(4, 4), own

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gate = self.g(x if self.own else condition)
        return x + gate * self.f(x.relu()) * 0.5


@pytest.mark.parametrize(("own", "branch"), [(False, "linear_1"), (True, "mul")])
def test_the_cut_lies_before_the_gate(own: bool, branch: str) -> None:
    (join,) = residual_joins(gw.capture(Gated(own), (torch.randn(2, 4), torch.randn(2, 4))))
    assert (join.stream.name, join.branch.name, join.kind) == ("x", branch, "mlp")


def test_of_nested_branches_the_innermost_is_taken() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return x + self.c(h + self.b(h))

    (join,) = residual_joins(gw.capture(Nested(), (torch.randn(2, 4),)))
    assert join.stream.name == "linear"
