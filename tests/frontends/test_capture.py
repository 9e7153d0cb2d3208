"""Capture: the program computes what the module does, at other sizes too, and refuses in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw


class Two(nn.Module):
    """Two inputs that no operator brings together, one of them by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 6)

    def forward(self, x: Tensor, *, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"a": self.a(x) * scale, "pair": (self.b(y), y.shape[0])}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu_()
        h[:, :2] *= 2.0
        h.add_(1.0)
        return self.b(h)


class Masked(nn.Module):
    """A mask repeated for the heads, which only works for masks of the sample's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        bias = mask[:, None].repeat_interleave(2, 0).view(batch, 2, -1, tokens)
        q = self.q(x).view(batch, tokens, 2, 4).transpose(1, 2)
        h = nn.functional.scaled_dot_product_attention(q, q, q, bias)
        return self.out(h.transpose(1, 2).reshape(batch, tokens, 8))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def symbols(program: gw.Program) -> set[str]:
    """Return the sizes of dimension 0 of the tensor inputs."""
    inputs = [node.meta["val"] for node in program.nodes if node.op == "placeholder"]
    return {str(value.shape[0]) for value in inputs if isinstance(value, Tensor)}


def test_other_batch_sizes_and_nested_outputs_are_those_of_the_module() -> None:
    model = Two().eval()
    program = gw.capture(model, (torch.randn(2, 3),), {"y": torch.randn(2, 5), "scale": 0.5})

    x, y = torch.randn(7, 3), torch.randn(7, 5)
    got, want = program(x, y=y, scale=0.5), model(x, y=y, scale=0.5)

    assert [spec.name for spec in program.inputs] == ["x", "y", "scale"]
    assert torch.equal(got["a"], want["a"]) and torch.equal(got["pair"][0], want["pair"][0])
    assert got["pair"][1] == 7
    assert float(want["a"].detach().abs().max()) > 0.1


def test_dimensions_of_one_label_have_one_symbol_even_where_no_operator_says_so() -> None:
    program = gw.capture(Two(), (torch.randn(2, 3),), {"y": torch.randn(2, 5), "scale": 1.0})
    assert len(symbols(program)) == 1

    apart = gw.capture(
        Two(), (torch.randn(2, 3),), {"y": torch.randn(2, 5), "scale": 1.0}, {"x": {0: "n"}, "y": {0: "m"}}
    )
    assert len(symbols(apart)) == 2
    assert apart(torch.randn(3, 3), y=torch.randn(4, 5), scale=1.0)["pair"][1] == 4


def test_heads_that_a_mask_is_repeated_for_can_be_removed() -> None:
    model = Masked().eval()
    program = gw.capture(model, (torch.randn(2, 5, 8), torch.randn(2, 5)))
    (head,) = [g for g in gw.depgraph(program).groups if g.kind == "head"]

    gw.resize(program, {head.name: [1]})

    x, mask = torch.randn(3, 5, 8), torch.randn(3, 5)
    masked = Masked().eval()
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        masked.out.weight[:, :4] = 0
        want = masked(x, mask)
        got = program(x, mask)
    assert program.parameters()["q.weight"].shape == (4, 8)
    assert float(want.abs().max()) > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_example_batch_of_one_is_doubled_so_that_the_batch_stays_free() -> None:
    program = gw.capture(InPlace().eval(), (torch.randn(1, 4),))
    assert program.inputs[0].shape[0] == "batch"
    assert any("doubled" in note for note in program.notes)
    assert program(torch.randn(5, 4)).shape == (5, 2)


def test_without_dynamic_dimensions_other_sizes_are_refused() -> None:
    program = gw.capture(InPlace().eval(), (torch.randn(2, 4),), dynamic={})
    with pytest.raises(gw.GraphwrightError, match="x"):
        program(torch.randn(3, 4))


def test_operators_in_place_leave_the_callers_tensor_alone() -> None:
    model = InPlace().eval()
    program = gw.capture(model, (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    before = x.clone()
    torch.testing.assert_close(program(x), model(x))
    assert torch.equal(x, before)


def test_tied_parameters_stay_one_tensor() -> None:
    program = gw.capture(Tied().eval(), (torch.zeros(2, 3, dtype=torch.long),))
    assert len({id(p) for p in program.parameters().values()}) == 1


def test_weights_on_meta_need_no_memory_and_no_inputs_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 16, 1 << 16), nn.ReLU(), nn.Linear(1 << 16, 8))
    program = gw.capture(model, (torch.randn(2, 1 << 16),))
    assert gw.depgraph(program).groups[0].size == 1 << 16


def test_the_module_and_its_training_mode_are_not_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    model[0].eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    program = gw.capture(model, (torch.randn(2, 3),))
    assert [m.training for m in model.modules()] == [True, False, True]
    assert not model._forward_pre_hooks
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    x = torch.randn(4, 3)
    assert torch.equal(program(x), model[0](x))  # captured as for inference


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"z": {0: "n"}}, r"dynamic names the input 'z'; the inputs are \['x', 'y', 'scale'\]"),
        ({"x": {4: "n"}}, "dimension 4 of 'x', which has 2 dimensions"),
        ({"scale": {0: "n"}}, "'scale', which is not a tensor but 1.0"),
        (
            {"x": {1: "n"}, "y": {1: "n"}},
            "'y' and dimension 1 of 'x' one name, 'n', but their example sizes are 5 and 3",
        ),
    ],
)
def test_wrong_dynamic_dimensions_are_named(dynamic: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.CaptureError, match=message):
        gw.capture(Two(), (torch.randn(2, 3),), {"y": torch.randn(2, 5), "scale": 1.0}, dynamic)


def test_a_dynamic_dimension_of_size_one_is_refused_with_the_reason() -> None:
    with pytest.raises(gw.CaptureError, match="example size is 1; give an example of size 2 or more"):
        gw.capture(nn.Linear(3, 2), (torch.randn(1, 3),), None, {"input": {0: "n"}})


def test_inputs_that_forward_does_not_take_are_refused() -> None:
    with pytest.raises(gw.CaptureError, match="Linear.forward does not take the example inputs"):
        gw.capture(nn.Linear(3, 2), (torch.randn(2, 3),), {"mask": torch.ones(2)})


def test_a_branch_on_values_is_refused_with_what_to_do() -> None:
    with pytest.raises(gw.CaptureError, match="the forward branches on the values of a tensor"):
        gw.capture(Branching(), (torch.randn(2, 3),))


class BySize(nn.Module):
    """Takes one of two layers by the number of rows."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Linear(5, 3), nn.Linear(5, 3), first

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if self.first == "contiguous" and n >= 64:
            x = x.contiguous()
        if self.first == "many":
            return self.a(x) if n > 4 else self.b(x)
        if self.first == "few":
            return self.a(x) if n < 64 else self.b(x)
        return self.b(x) if self.first == "even" and n % 2 else self.a(x)


@pytest.mark.parametrize(("first", "good", "bad"), [("many", 5, 4), ("few", 63, 64), ("even", 4, 7)])
def test_a_size_of_another_branch_than_the_captured_one_is_refused(first: str, good: int, bad: int) -> None:
    model = BySize(first).eval()
    program = gw.capture(model, (torch.randn(8, 5),))
    x = torch.randn(good, 5)
    assert torch.equal(program(x), model(x))
    with pytest.raises(gw.InputError, match=rf"captured where .*size\('x', 0\).*got 'x' of shape \[{bad}, 5\]"):
        program(torch.randn(bad, 5))


def test_a_branch_that_computes_the_same_is_no_condition() -> None:
    model = BySize("contiguous").eval()
    program = gw.capture(model, (torch.randn(8, 5),))
    assert program.guards == ()
    for n in (3, 63, 64, 200):
        x = torch.randn(n, 5)
        assert torch.equal(program(x), model(x))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y, z = (torch.randn(4, 6, 8) for _ in range(3))
    program = gw.capture(model, (x, x, x))
    want = model(x, y, z)[0]
    torch.testing.assert_close(program(x, y, z)[0], want)
    assert float((want - model(x, x, x)[0]).abs().max()) > 0.05


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)
        self.register_buffer("cache", torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.cache


def test_a_batch_that_the_model_fixes_is_static_with_a_note_and_nothing_stays_on_the_inputs() -> None:
    x = torch.randn(4, 5)
    model = FixedBatch().eval()
    program = gw.capture(model, (x,))
    assert program.inputs[0].shape == (4, 5)
    assert any("the batch is static" in note for note in program.notes)
    assert not x.__dict__
    assert torch.equal(program(x), model(x))


class Counting(nn.Module):
    """Changes its own buffers at every call."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.calls += 1
        self.mean[:].mul_(0.5).add_(h.mean(0).detach(), alpha=0.5)
        return self.b(h - self.mean) + self.calls


def test_a_program_that_writes_its_buffers_writes_its_own() -> None:
    model = Counting().eval()
    program = gw.capture(model, (torch.randn(2, 5),))
    copied = program.copy()
    x, y = torch.randn(3, 5), torch.randn(4, 5)

    got = [program(x), program(y)]
    assert float(model.calls) == 0 and not model.mean.any()
    want = [model(x), model(y)]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(copied(x), want[0])  # from the start again


def test_calibration_leaves_the_state_of_the_program_alone() -> None:
    model = Counting().eval()
    program = gw.capture(model, (torch.randn(2, 5),))
    before = program.tensors()["calls"].clone()
    context = gw.Context(loss=lambda p, batch: p(batch).square().mean(), batches=[torch.randn(4, 5)] * 3)
    gw.Pipeline([gw.RemoveChannels(ratio=0.5, criterion="taylor")])(program, context)
    gw.RemoveChannels(ratio=0.5, criterion="taylor")(program, context)
    assert torch.equal(program.tensors()["calls"], before)
    assert program.parameters()["a.weight"].shape == (4, 5)


class Named(nn.Module):
    """Has inputs called like a parameter, like what the code of a graph calls itself, and like words of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((5,), 2.0))
        self.layer = nn.Linear(5, 5)

    def forward(self, scale: Tensor, layer_weight: Tensor, device: Tensor, inf: Tensor, **more: Tensor) -> Tensor:
        total = self.layer(scale) * self.scale + 3 * scale + 5 * layer_weight + 7 * device + 11 * inf
        return total + 13 * more["class"] + 17 * more["torch"]


@pytest.mark.parametrize("dynamic", [None, {}], ids=["any batch", "one batch"])
def test_inputs_may_be_called_anything(dynamic: dict[str, Any] | None) -> None:
    names = ["scale", "layer_weight", "device", "inf", "class", "torch"]
    inputs = {name: torch.randn(2, 5, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    model = Named().eval()
    program = gw.capture(model, (), inputs, dynamic=dynamic)
    other = {name: value + 1 for name, value in inputs.items()}
    torch.testing.assert_close(program(**other), model(**other))
    torch.testing.assert_close(program.copy()(**other), model(**other))
