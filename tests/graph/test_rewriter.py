"""New nodes have a shape, an origin and a rule; new inputs and outputs are part of the program's signature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from graphwright.frontends.capture import capture
from graphwright.graph.errors import InputError, PreconditionError
from graphwright.graph.program import Program
from graphwright.graph.rewriter import Rewriter
from graphwright.graph.verify import verify

aten = torch.ops.aten


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.inner(x)
        return {"y": h * torch.sigmoid(h)}


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.fixture
def program() -> Program:
    return capture(Gate().eval(), (seeded(3, 4),), dynamic={"x": {0: "batch"}})


def find(program: Program, target: object) -> Node:
    return next(n for n in program.nodes if n.target is target)


def test_a_call_has_shape_origin_and_rule_and_replaces(program: Program) -> None:
    x, want = seeded(5, 4), program(seeded(5, 4))["y"]
    product, h = find(program, aten.mul.Tensor), find(program, aten.linear.default)
    stack, count = product.meta["nn_module_stack"], len(list(program.nodes))
    rw = Rewriter(program, "to-silu")
    silu = rw.call(aten.silu.default, h, origin=product)
    rw.replace(product, silu)
    program.changed()
    verify(program)
    assert silu.meta["val"].shape == h.meta["val"].shape and not isinstance(silu.meta["val"].shape[0], int)
    assert silu.meta["nn_module_stack"] == stack and silu.meta["rewritten_by"] == "to-silu"
    assert len(list(program.nodes)) == count - 1  # product and sigmoid gone, silu came
    assert want.abs().max() > 0.1
    torch.testing.assert_close(program(x)["y"], want)


def test_a_replacement_may_read_what_it_replaces(program: Program) -> None:
    x, want = seeded(5, 4), program(seeded(5, 4))["y"]
    product = find(program, aten.mul.Tensor)
    following = next(iter(product.users))
    rw = Rewriter(program, "double")
    rw.replace(product, rw.call(aten.mul.Tensor, product, 2.0, origin=following))
    program.changed()
    verify(program)
    torch.testing.assert_close(program(x)["y"], 2 * want)


def test_a_call_that_does_not_fit_raises_at_once_and_inserts_nothing(program: Program) -> None:
    product, count = find(program, aten.mul.Tensor), len(list(program.nodes))
    with pytest.raises(RuntimeError):
        Rewriter(program, "r").call(aten.view.default, product, [7, 5, 11], origin=next(iter(product.users)))
    assert len(list(program.nodes)) == count


def test_new_input_and_outputs_are_in_the_signature_with_their_label(program: Program) -> None:
    x, cached, want = seeded(5, 4), torch.full((5, 6), 3.0), program(seeded(5, 4))["y"]
    rw = Rewriter(program, "cache")
    read = rw.placeholder("cached", torch.zeros(3, 6), ("batch", 6))
    product = find(program, aten.mul.Tensor)
    total = rw.call(aten.add.Tensor, product, read, origin=next(iter(product.users)))
    rw.outputs({"total": total})
    program.changed()
    verify(program)
    result, added = program(x, cached=cached)
    torch.testing.assert_close(result["y"], want)
    torch.testing.assert_close(added["total"], want + 3)
    with pytest.raises(InputError, match="input 'cached' of Gate is missing"):
        program(x)
    with pytest.raises(InputError, match="dimension 'batch' is 5 in input 'x' and 4 in input 'cached'"):
        program(x, cached=cached[:4])
    assert program.copy()(x, cached=cached)[1]["total"].shape == (5, 6)


def test_taken_names_and_unknown_labels_are_refused(program: Program) -> None:
    rw = Rewriter(program, "cache")
    with pytest.raises(PreconditionError, match="cache cannot add the input 'x'"):
        rw.placeholder("x", torch.zeros(2))
    with pytest.raises(PreconditionError, match="no input of Gate has a dynamic dimension 'frames'"):
        rw.placeholder("y", torch.zeros(2), ("frames",))
    with pytest.raises(PreconditionError, match="cache cannot add the tensor 'inner.weight'"):
        rw.tensor("inner.weight", torch.zeros(2), find(program, aten.linear.default))


def test_a_new_tensor_is_owned_and_dead_nodes_go_with_what_only_they_read(program: Program) -> None:
    product = find(program, aten.mul.Tensor)
    rw = Rewriter(program, "scale")
    scale = rw.tensor("inner.scale", nn.Parameter(torch.full((6,), 2.0)), product)
    scaled = rw.call(aten.mul.Tensor, product.args[0], scale, origin=product)
    assert "inner.scale" in program.parameters()
    assert rw.erase_dead(product) == 0  # it is read
    assert rw.erase_dead(scaled) == 2
    program.changed()
    verify(program)
