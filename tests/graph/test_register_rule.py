"""An operator of somebody else's library: frozen and reported without a rule, removable with one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import DepGraph, depgraph
from graphwright.graph.oracle import masked_parameters
from graphwright.graph.resize import resize
from graphwright.graph.rules import Analysis, Dims, Resizer, register_rule, rule_for, unregister_rule

WIDTH, PARTS = 12, 3


@torch.library.custom_op("graphwright_tests::scale_parts", mutates_args=())
def scale_parts(x: Tensor, scale: Tensor, width: int) -> Tensor:
    """Multiply each of the consecutive parts of ``width`` columns of ``x[rows, parts * width]`` by ``scale[width]``."""
    assert x.shape[-1] % width == 0
    return (x.unflatten(-1, (-1, width)) * scale).flatten(-2)


@scale_parts.register_fake
def _(x: Tensor, scale: Tensor, width: int) -> Tensor:
    torch._check(x.shape[-1] % width == 0 and scale.shape[0] == width)
    return torch.empty_like(x)


TARGET = torch.ops.graphwright_tests.scale_parts.default


def axes(an: Analysis, node: Node) -> Dims:
    x, scale = an.of(node.args[0]), an.of(node.args[1])
    parts = an.leaf(x[-1].size // scale[0].size)
    an.unify(x[-1], an.product([parts, scale[0]]))
    return x


def rewrite_width(rz: Resizer, node: Node) -> None:
    node.update_arg(2, rz.size(rz.of(node.args[1])[0]))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH // PARTS) + 0.5)
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(scale_parts(self.first(x).relu(), self.scale, WIDTH // PARTS))


@pytest.fixture
def registered() -> Iterator[None]:
    register_rule(TARGET, axes, rewrite_width)
    yield
    unregister_rule(TARGET)


def model() -> Model:
    torch.manual_seed(0)
    return Model().double().eval()


def analysed() -> DepGraph:
    return depgraph(capture(model(), (torch.randn(2, 5, dtype=torch.float64),)))


def test_operator_without_rule_freezes_what_it_touches_and_is_reported() -> None:
    graph = analysed()
    assert graph.unknown == (str(TARGET),)
    assert graph.groups == ()
    frozen = {member: axis for axis in graph.frozen for member in axis.members}
    for member in (("first.weight", 0), ("first.bias", 0), ("scale", 0), ("last.weight", 1)):
        assert "scale_parts" in frozen[member].reason and "no rule" in frozen[member].reason
        assert "scale_parts" in frozen[member].where


@pytest.mark.usefixtures("registered")
def test_operator_with_a_rule_becomes_removable_and_equals_masking() -> None:
    graph = analysed()
    assert graph.unknown == ()
    assert sorted(group.size for group in graph.groups) == [PARTS, WIDTH // PARTS]
    x = torch.randn(4, 5, dtype=torch.float64)
    for group, kept in zip(graph.groups, ([0, 2], [1, 2]), strict=True):
        smaller = graph.program.copy()
        record = resize(smaller, {group.name: kept})
        assert record.tensors["last.weight"][1].of == WIDTH and len(record.tensors["last.weight"][1].kept) < WIDTH
        # Without a word on sums or statistics the rule promises that removal equals masking.
        assert group.exactness == "exact"
        want = torch.func.functional_call(model(), masked_parameters(model(), record), (x,))
        torch.testing.assert_close(smaller(x), want, rtol=1e-12, atol=1e-12)
        assert want.abs().max() > 1e-3


@pytest.mark.usefixtures("registered")
def test_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_parts.default has a rule already"):
        register_rule(TARGET, axes)


def test_rule_for_an_operator_of_torch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aten.linear.default has a rule already"):
        register_rule(torch.ops.aten.linear.default, axes)


def test_rule_for_a_family_of_overloads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"such as graphwright_tests.scale_parts.default"):
        register_rule(torch.ops.graphwright_tests.scale_parts, axes)


def test_unregistering_forgets() -> None:
    register_rule(TARGET, axes)
    assert rule_for(TARGET) is not None
    unregister_rule(TARGET)
    assert rule_for(TARGET) is None
    assert analysed().unknown == (str(TARGET),)
