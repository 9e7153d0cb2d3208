"""The tensors-only form of a program: names, constants, refusals."""

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.flat import flat_program, output_names
from graphwright.frontends.capture import capture
from graphwright.graph.errors import ExportError


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0, cond: dict[str, Tensor] | None = None, flag: bool = True) -> dict:
        assert cond is not None
        y = self.linear(x) * scale
        return {"logits": y, "aux": (y + cond["a"], None, x.shape[0]), "x": x.sum(1) if flag else x}


def nested_program():
    x, cond = torch.randn(2, 4), {"a": torch.randn(2, 3)}
    return capture(Nested(), (x, 2.5), {"cond": cond, "flag": True})


def test_constants_and_outputs_that_are_no_tensors_are_left_out() -> None:
    program = nested_program()
    before = str(program.graph_module.graph)
    flat = flat_program(program)
    assert [spec.name for spec in flat.inputs] == ["x", "cond.a"]
    assert flat.constants == {"scale": 2.5, "flag": True}
    assert flat.outputs == ("logits", "aux.0", "out_x")
    assert flat.dropped["aux.1"] is None
    assert set(flat.dropped) == {"aux.1", "aux.2"}
    expected = flat.select_outputs(program.graph_module(*program.example))
    actual = flat.module(*flat.select_inputs(program.example))
    assert len(actual) == 3
    for want, got in zip(expected, actual, strict=True):
        assert torch.equal(want, got)
        assert want.abs().max() > 0.1
    assert str(program.graph_module.graph) == before


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor):
        return self.make(x + 1)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y: y, ["output_0"]),
        (lambda y: (y, y * 2), ["output_0", "output_1"]),
        (lambda y: [y, {"a": y * 2}], ["output_0", "output_1.a"]),
        (lambda y: {"x": y, "out_x": y * 2}, ["out_x", "out_out_x"]),
        (lambda y: {"with space": y}, ["with_space"]),
        (lambda y: torch.max(y, 1), ["output_0", "output_1"]),
    ],
)
def test_outputs_are_named_after_their_path(make, names: list[str]) -> None:
    assert output_names(capture(Returns(make), (torch.randn(2, 3),))) == names


def test_output_class_without_path_names_is_named_by_its_keys() -> None:
    outputs = pytest.importorskip("diffusers.models.unets.unet_2d")
    program = capture(Returns(lambda y: outputs.UNet2DOutput(sample=y)), (torch.randn(2, 3),))
    assert output_names(program) == ["sample"]


@pytest.mark.parametrize(
    "forward",
    [lambda x: x + torch.randn_like(x), lambda x: torch.dropout(x, 0.5, True), lambda x: torch.bernoulli(x.sigmoid())],
)
def test_random_numbers_are_refused_with_their_place(forward) -> None:
    program = capture(Returns(forward), (torch.randn(2, 3),))
    with pytest.raises(ExportError, match=r"draws random numbers(.|\n)*test_flat\.py"):
        flat_program(program)


class Quiet(nn.Module):
    """Operators that could draw random numbers and here do not."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, dropout=0.5, num_layers=2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.rnn(x)[0])
        return torch.nn.functional.scaled_dot_product_attention(y, y, y)


def test_operators_that_draw_only_in_training_are_accepted() -> None:
    assert flat_program(capture(Quiet(), (torch.randn(3, 2, 4),), dynamic={})).outputs == ("output_0",)


def test_program_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    with pytest.raises(ExportError, match="'weight'; load the weights"):
        flat_program(capture(model, (torch.randn(2, 4),)))


def test_program_without_tensor_output_is_refused() -> None:
    with pytest.raises(ExportError, match="no tensor among its outputs"):
        flat_program(capture(Returns(lambda y: y.shape[0]), (torch.randn(2, 3),)))
