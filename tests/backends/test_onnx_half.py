"""Float16 files: smaller, close, and float32 where it matters."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.onnx_export import export_onnx
from graphwright.backends.onnx_half import periodic_arguments
from graphwright.frontends.capture import capture
from graphwright.graph.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Timed(nn.Module):
    """A time embedding with arguments up to 999, where float16 has steps of 0.5, and a norm whose squares overflow."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, -3, 8))
        self.embed = nn.Linear(16, 64)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None].float() * self.frequencies
        h = x + self.embed(torch.cat([angles.sin(), angles.cos()], -1))
        big = h * 400  # squares beyond 65504
        return self.out(big * torch.rsqrt(big.pow(2).mean(-1, keepdim=True) + 1e-6))


def make_program():
    torch.manual_seed(0)
    model = Timed().eval()
    return model, capture(model, (torch.randn(2, 64), torch.tensor([7, 999])))


def test_float16_file_is_smaller_and_close(tmp_path: Path) -> None:
    model, program = make_program()
    full = export_onnx(program, tmp_path / "full")
    half = export_onnx(program, tmp_path / "half", fp16=True)
    sizes = [a.manifest["files"]["model.onnx.data"]["bytes"] for a in (half, full)]
    assert sizes[0] < 0.6 * sizes[1]
    x, timestep = torch.randn(3, 64), torch.tensor([998, 501, 3])
    (got,) = half.runner()(x, timestep)
    with torch.no_grad():
        want = model(x, timestep)
    assert got.dtype is torch.float32
    # A float16 has 11 bits: 5e-4 a rounding, a few of them in a row, relative to the largest value.
    assert (got - want).abs().max() < 4e-3 * want.abs().max()
    assert (got - want).abs().max() > 1e-5 * want.abs().max()  # it did compute in float16
    stored = {t.data_type for t in onnx.load(half.path, load_external_data=False).graph.initializer if len(t.dims) == 2}
    assert stored == {onnx.TensorProto.FLOAT16}


def test_manifest_keeps_both_comparisons(tmp_path: Path) -> None:
    facts = export_onnx(make_program()[1], tmp_path, fp16=True, fp16_tolerance=0.01).manifest
    assert (facts["precision"], facts["tolerance"], facts["float32_tolerance"]) == ("float16", 0.01, 1e-4)
    assert all(check["max_difference"] < 1e-5 for check in facts["float32_checks"])
    assert all(1e-5 < check["max_difference"] < 0.01 for check in facts["checks"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "model.onnx", "model.onnx.data"]


def test_float16_that_differs_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the float16 ONNX file of Timed does not compute"):
        export_onnx(make_program()[1], tmp_path / "out", fp16=True, fp16_tolerance=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_recurrent_layers_are_refused(tmp_path: Path) -> None:
    program = capture(nn.GRU(4, 4, batch_first=True), (torch.randn(2, 3, 4),))
    with pytest.raises(ExportError, match="1 recurrent layers"):
        export_onnx(program, tmp_path / "out", fp16=True)
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_sines_end_at_weight_matrices() -> None:
    node = onnx.helper.make_node
    nodes = [
        node("MatMul", ["x", "weight"], ["hidden"], "linear"),
        node("Mul", ["hidden", "alpha"], ["scaled"], "snake_scale"),
        node("Sin", ["scaled"], ["wave"], "snake"),
        node("Cast", ["t"], ["time"], "cast"),
        node("MatMul", ["time", "frequencies"], ["angles"], "angles"),
        node("Cos", ["angles"], ["table"], "table"),
        node("Relu", ["table"], ["out"], "relu"),
        node("Transpose", ["stored"], ["turned"], "transpose"),
        node("MatMul", ["x", "turned"], ["other"], "tied"),
        node("Sin", ["other"], ["other_wave"], "other_sine"),
    ]
    tensors = [onnx.helper.make_tensor(name, 1, [2, 2], [1.0] * 4) for name in ("weight", "stored")]
    tensors.append(onnx.helper.make_tensor("frequencies", 1, [1, 2], [1.0] * 2))
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    assert periodic_arguments(graph) == {"snake", "snake_scale", "table", "angles", "cast", "other_sine"}
