"""Program: what a call with wrong inputs says, and which tensors are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.cost import cost, parameter_count
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import InputError, VerificationError
from graphwright.graph.program import Program, distinct, tensor_identity
from graphwright.graph.resize import resize
from graphwright.graph.verify import verify


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor, states: list[Tensor], *, scale: Tensor) -> Tensor:
        return self.a(x) + self.b(states[0]) * scale + states[1]


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


ARGS = (ones(3, 4), [ones(3, 4), ones(3, 6)])


@pytest.fixture(scope="module")
def program() -> Program:
    dynamic = {"x": {0: "batch"}, "states.0": {0: "batch"}, "states.1": {0: "batch"}}
    return capture(Two(), ARGS, {"scale": ones(6)}, dynamic=dynamic)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (*ARGS, ones(6)),
            {"scale": ones(6)},
            r"Two takes 2 inputs by position \(x, states\), got 3; pass the others by name",
        ),
        (ARGS[:1], {"scale": ones(6)}, "input 'states' of Two is missing; it was captured with x, states, scale"),
        (
            (ARGS[0], ones(3, 4)),
            {"scale": ones(6)},
            r"input 'states' of Two was captured as list\(one value, one value\), got one value; pass",
        ),
        (
            (ARGS[0], {"a": ones(1), "b": ones(1)}),
            {"scale": ones(6)},
            r"got dict a, b \(one value, one value\)",
        ),
        (
            (ARGS[0], [ones(2, 4), ones(3, 6)]),
            {"scale": ones(6)},
            r"dimension 'batch' is 3 in input 'x' and 2 in input 'states.*0.*'; it must be the same",
        ),
    ],
)
def test_wrong_inputs_are_named_in_one_sentence(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        program(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_dimensions_of_one_label_may_vary_together(program: Program) -> None:
    assert program(ones(5, 4), [ones(5, 4), ones(5, 6)], scale=ones(6)).shape == (5, 6)


class Tied(nn.Module):
    """Two `Parameter` objects over one storage, as some checkpoints' loading code makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.b.weight = nn.Parameter(self.a.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).relu() + self.b(x).tanh())


def test_two_parameters_over_one_storage_stay_one_tensor_in_a_removal() -> None:
    model = Tied()
    assert model.a.weight is not model.b.weight
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    program = capture(model, (x,))
    graph = depgraph(program)
    counted = 4 * 8 + 8 + 8 + 8 * 2 + 2
    assert parameter_count(program) == parameter_count(model) == cost(program).parameters == counted
    (group,) = (g for g in graph.groups if g.size == 8)
    assert group.exact is (group.exactness == "exact")
    resize(program, {group.name: [0, 2, 5]}, graph)
    tensors = program.tensors()
    assert tensors["a.weight"].shape == (3, 4)
    assert tensor_identity(tensors["a.weight"]) == tensor_identity(tensors["b.weight"])
    assert tensors["a.weight"] is tensors["b.weight"]
    assert parameter_count(program) == 3 * 4 + 3 + 3 + 3 * 2 + 2
    keep = torch.tensor([0, 2, 5])
    with torch.no_grad():
        h = model.a(x).relu()[:, keep] + model.b(x).tanh()[:, keep]
        want = h @ model.out.weight[:, keep].T + model.out.bias
    assert want.abs().max() > 0.1
    torch.testing.assert_close(program(x), want)


def test_identity_tells_views_dtypes_and_objects_without_memory_apart() -> None:
    base = torch.arange(12.0)
    assert tensor_identity(base) == tensor_identity(base.detach()) == tensor_identity(nn.Parameter(base))
    different = [base, base[1:], base.view(3, 4), base.view(4, 3), base.view(torch.int32), base.clone()]
    assert len(distinct([*different, base.view(12)])) == len(different)
    meta = torch.empty(3, device="meta")
    assert tensor_identity(meta) == tensor_identity(meta) != tensor_identity(torch.empty(3, device="meta"))
    assert len(distinct([torch.empty(0), torch.empty(0)])) == 2


def test_a_graph_that_uses_a_node_before_it_is_defined_is_refused_with_node_and_origin(program: Program) -> None:
    broken = program.copy()
    nodes = [n for n in broken.nodes if "linear" in str(n.target)]
    first, last = nodes[0], next(iter(reversed(list(broken.nodes)))).all_input_nodes[0]
    first.args = (last, *first.args[1:])
    with pytest.raises(VerificationError, match="which is defined after it") as caught:
        verify(broken)
    assert f"%{first.name}" in str(caught.value) and "in a (torch.nn.modules.linear.Linear)" in str(caught.value)
    assert caught.value.node is first


def test_a_read_of_a_tensor_that_is_gone_is_refused_with_the_node(program: Program) -> None:
    broken = program.copy()
    del broken.graph_module.a.bias  # type: ignore[union-attr]
    with pytest.raises(VerificationError, match=r"there is no tensor or graph 'a\.bias'\n  at %"):
        verify(broken)
