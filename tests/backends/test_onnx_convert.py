"""Guards in the names of dimensions, and repairs of the converted model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.flat import flat_program
from graphwright.backends.onnx_convert import _always_holds, _widen_rotary_tables, convert
from graphwright.frontends.capture import capture
from graphwright.graph.errors import ExportError

onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")


class Halves(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        pairs = x.reshape(x.shape[0], 2, -1).sum(1)
        return pairs + y[:, :1], torch.cat([x, x], 0)


def test_guards_and_output_sizes_are_in_the_names_of_dimensions() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    program = capture(Halves(), (x, y), dynamic={"x": {0: "batch", 1: "width"}, "y": {0: "batch"}})
    flat = flat_program(program)
    converted = convert(flat, (x, y), 23)
    assert converted.outputs[0][0] == "batch"
    assert converted.outputs[1] == ("2*batch", "width")
    # All that is asked is an even width above 2, in whatever words.
    assert not any("L[" in guard for guard in converted.guards)
    allowed = [
        width for width in range(2, 12) if all(eval(guard, {"batch": 3, "width": width}) for guard in converted.guards)
    ]
    assert allowed == [4, 6, 8, 10]


@pytest.mark.parametrize(
    ("code", "holds"),
    [
        ("(4*a) % a == 0", True),
        ("a*b == b*a", True),
        ("a % 2 == 0", False),
        ("a <= 64", False),
        ("a != 2", False),
        ("a == b", False),
        ("unknown(a)", False),
    ],
)
def test_guards_that_always_hold_are_recognised(code: str, holds: bool) -> None:
    assert _always_holds(code, ["a", "b"]) is holds


def test_dimensions_are_named_where_values_share_their_shape() -> None:
    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.glu(x, 1).tanh()

    # The exporter gives both halves, and what is computed from them, one frozen shape.
    x = torch.randn(2, 6)
    model = convert(flat_program(capture(Gated(), (x,))), (x,), 23).program.model
    shapes = [[str(getattr(dim, "value", dim)) for dim in v.shape] for node in model.graph for v in node.outputs]
    assert len(shapes) > 3 and shapes.count(["batch", "3"]) == len(shapes)


def test_dimension_that_torch_fixes_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 8) + torch.arange(x.shape[0])[:, None]

    program = capture(Fixed(), (torch.randn(4, 8),), dynamic={})
    # What a rewrite may do: call a dimension dynamic that the graph has a literal for.
    flat = flat_program(program)
    flat.inputs[0].__dict__["shape"] = ("batch", 8)
    flat.module.graph.find_nodes(op="placeholder")[0].meta.clear()
    with pytest.raises(ExportError, match=r"with the dynamic dimensions \['batch'\](.|\n)*static"):
        convert(flat, program.example, 23)


def rotary_model(table_batch: int | str) -> Any:
    def value(name: str, shape: list[int | str]) -> Any:
        return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))

    x, angles = value("x", ["batch", 2, 5, 4]), value("angles", [table_batch, 5, 2])
    cos, sin = onnx_ir.node("Cos", [angles]), onnx_ir.node("Sin", [angles])
    rotary = onnx_ir.node("RotaryEmbedding", [x, cos.outputs[0], sin.outputs[0]])
    second = onnx_ir.node("RotaryEmbedding", [rotary.outputs[0], cos.outputs[0], sin.outputs[0]])
    for node in (rotary, second):
        node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    graph = onnx_ir.Graph(
        [x, angles], [second.outputs[0]], nodes=[cos, sin, rotary, second], opset_imports={"": 23}, name="g"
    )
    return onnx_ir.Model(graph, ir_version=10)


def test_rotary_tables_get_the_batch_of_their_input() -> None:
    ort, np = pytest.importorskip("onnxruntime"), pytest.importorskip("numpy")
    model = rotary_model(1)
    _widen_rotary_tables(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Expand") == 2  # one for the cosine and one for the sine, shared by both embeddings
    model.graph.outputs[0].name = "out"
    content = onnx_ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    x, angles = (torch.randn(*shape, generator=generator) for shape in ((3, 2, 5, 4), (1, 5, 2)))
    (got,) = session.run(["out"], {"x": x.numpy(), "angles": angles.numpy()})
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    want = x
    for _ in range(2):
        want = want * cos + torch.cat([-want[..., 2:], want[..., :2]], -1) * sin
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


def test_rotary_tables_of_the_right_batch_stay() -> None:
    model = rotary_model("batch")
    _widen_rotary_tables(model)
    assert [node.op_type for node in model.graph] == ["Cos", "Sin", "RotaryEmbedding", "RotaryEmbedding"]
