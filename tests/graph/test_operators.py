"""Names and arguments of operators, and where layers have their weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from graphwright.graph.operators import (
    LAYERS,
    RECURRENT,
    arg,
    base_name,
    bias_of,
    groups_of,
    is_convolution,
    is_transposed,
    layer_of,
    operator_name,
    set_groups,
    weight_of,
)

aten = torch.ops.aten


def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Return a node that calls ``target``; texts become placeholders of that name."""
    graph = Graph()
    made = [graph.placeholder(a) if isinstance(a, str) else a for a in args]
    named = {k: graph.placeholder(v) if isinstance(v, str) else v for k, v in kwargs.items()}
    return graph.call_function(target, tuple(made), named)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.relu_.default, "relu"),
        (aten.add.Tensor, "add"),
        (aten.__and__.Tensor, "__and__"),
        (aten._softmax.default, "_softmax"),
        (operator.getitem, "getitem"),
        (torch.ops.prims.convert_element_type.default, "prims::convert_element_type"),
    ],
)
def test_operator_name_drops_overload_and_in_place_mark_only(target: Any, name: str) -> None:
    assert operator_name(target) == name


def test_base_name_of_what_calls_nothing_is_empty() -> None:
    assert base_name(Graph().placeholder("x")) == ""


def test_argument_by_position_name_or_default() -> None:
    assert arg(call(aten.softmax.int, "x", 3), 1, "dim") == 3
    assert arg(call(aten.softmax.int, "x", dim=2), 1, "dim") == 2
    assert arg(call(aten.softmax.int, "x"), 1, "dim", -1) == -1


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_the_schema_has_weight_bias_and_groups_where_the_table_says(name: str) -> None:
    layer = LAYERS[name]
    packet = getattr(aten, name)
    arguments = [a.name for a in getattr(packet, packet.overloads()[0])._schema.arguments]
    assert arguments[layer.weight[0]] == layer.weight[1]
    if layer.bias is not None:
        assert arguments[layer.bias[0]] == layer.bias[1]
    if layer.groups is not None:
        assert arguments[layer.groups] == "groups"


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_recurrent_operators_exist(name: str) -> None:
    assert hasattr(aten, name)


def test_general_convolution_is_transposed_if_its_argument_says_so() -> None:
    def general(transposed: bool) -> Node:
        return call(aten.convolution.default, "x", "w", "b", [1], [0], [1], transposed, [0], 4)

    assert [is_transposed(general(t)) for t in (False, True)] == [False, True]
    assert [layer_of(general(t)).outputs for t in (False, True)] == [0, 1]  # type: ignore[union-attr]
    assert groups_of(general(True)) == 4 and is_convolution(general(True))


def test_weight_bias_and_groups_by_position_and_by_name() -> None:
    by_name = call(aten.conv2d.default, "x", "w", bias="b", groups=2)
    assert (str(weight_of(by_name)), str(bias_of(by_name)), groups_of(by_name)) == ("w", "b", 2)
    set_groups(by_name, 1)
    assert groups_of(by_name) == 1
    padded = call(aten.conv2d.padding, "x", "w", None, [1, 1], "same_text", [1, 1], 8)
    assert groups_of(padded) == 8 and bias_of(padded) is None and not is_transposed(padded)
    added = call(aten.addmm.default, "b", "x", "w")
    assert (str(weight_of(added)), str(bias_of(added)), groups_of(added)) == ("w", "b", 1)


def test_what_is_no_layer_has_no_weight() -> None:
    node = call(aten.relu.default, "x")
    assert layer_of(node) is None and weight_of(node) is None and bias_of(node) is None and not is_convolution(node)
