"""An exported file computes what the model does, at other shapes too, or it is not written."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphwright.backends import onnx_file as onnx_file_module
from graphwright.backends.onnx_cleanup import SUBSTITUTES, Substitute
from graphwright.backends.onnx_export import OnnxArtifact, export_onnx
from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import ExportError, InputError, ProviderError
from graphwright.graph.program import Program
from graphwright.graph.resize import resize

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """Its names are chosen to collide: input and output `x`, input `relu`, constant `linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor, relu: Tensor, linear: bool = True) -> dict[str, object]:
        h = torch.relu(self.norm(self.conv(x)))
        y = self.linear(h.mean((2, 3))) + relu
        return {"logits": y, "aux": (h.sum((1, 2)), None), "x": y.argmax(1), "same": y}


def make_program() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Net().eval()
    dims = {"x": {0: "batch", 2: "height"}, "relu": {0: "batch"}}
    return model, capture(model, (torch.randn(2, 3, 8, 6), torch.randn(2, 5)), {"linear": True}, dims)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    return export_onnx(make_program()[1], tmp_path_factory.mktemp("onnx") / "out", providers=["cpu"])


def test_plain_onnx_runtime_gives_what_the_model_gives(exported: OnnxArtifact) -> None:
    """No code of ours between the file and the numbers, at sizes that the export did not try."""
    model, _ = make_program()
    session = ort.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    for batch, height in ((1, 8), (2, 8), (5, 11)):
        x, relu = torch.randn(batch, 3, height, 6), torch.randn(batch, 5)
        with torch.no_grad():
            want = model(x, relu)
        logits, aux, best, same = session.run(
            ["logits", "aux.0", "out_x", "same"], {"x": x.numpy(), "relu": relu.numpy()}
        )
        # Batch norm is folded into the convolution: a few float32 roundings.
        np.testing.assert_allclose(logits, want["logits"].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(aux, want["aux"][0].numpy(), rtol=1e-4, atol=1e-5)
        assert np.array_equal(best, want["x"].numpy())
        assert np.array_equal(logits, same)
        assert logits.std() > 0.1


def test_file_has_the_names_of_the_signature_and_of_the_dimensions(exported: OnnxArtifact) -> None:
    graph = onnx.load(exported.path, load_external_data=False).graph

    def shape(value) -> list:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert {v.name: shape(v) for v in graph.input} == {"x": ["batch", 3, "height", 6], "relu": ["batch", 5]}
    assert [v.name for v in graph.output] == ["logits", "aux.0", "out_x", "same"]
    assert shape(graph.output[0]) == ["batch", 5]
    weights = {tensor.name for tensor in graph.initializer}
    assert {"conv.weight", "linear.weight"} <= weights
    names = [v.name for v in graph.input] + [o for node in graph.node for o in node.output] + list(weights)
    assert len(names) == len(set(names))


def test_file_holds_no_paths_of_this_machine(exported: OnnxArtifact) -> None:
    content = exported.path.read_bytes()
    assert b"site-packages" not in content
    assert os.fsencode(Path(__file__).name) not in content


def test_weights_lie_beside_the_file(exported: OnnxArtifact) -> None:
    assert sorted(f.name for f in exported.directory.iterdir()) == ["manifest.json", "model.onnx", "model.onnx.data"]
    graph = onnx.load(exported.path, load_external_data=False).graph
    conv = next(tensor for tensor in graph.initializer if tensor.name == "conv.weight")
    assert {entry.key: entry.value for entry in conv.external_data}["location"] == "model.onnx.data"
    assert (exported.directory / "model.onnx.data").stat().st_size >= 3 * 8 * 9 * 4


def test_manifest_says_what_was_done(exported: OnnxArtifact) -> None:
    facts = json.loads((exported.directory / "manifest.json").read_text())
    assert facts == exported.manifest
    assert (facts["kind"], facts["format_version"], facts["name"]) == ("onnx", 1, "Net")
    assert (facts["opset"], exported.opset, facts["precision"]) == (23, 23, "float32")
    assert facts["providers"] == ["CPUExecutionProvider"] and exported.providers == ("CPUExecutionProvider",)
    assert facts["constants"] == {"linear": True} and facts["dropped_outputs"] == {"aux.1": None}
    assert [check["inputs"] for check in facts["checks"]] == [
        "example inputs",
        "other values, seed 0",
        "second shape batch=3, height=16, seed 1",
    ]
    assert facts["tolerance"] == 1e-4
    assert 0 < exported.max_difference < 1e-5


def test_group_norm_takes_opset_20_and_others_23(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU())
    artifact = export_onnx(capture(model, (torch.randn(2, 3, 4, 4),)), tmp_path)
    assert artifact.opset == 20
    assert "1 group norms" in artifact.manifest["opset_reason"]
    assert artifact.max_difference < 1e-5
    operators = {node.op_type for node in onnx.load(artifact.path, load_external_data=False).graph.node}
    assert "InstanceNormalization" in operators and "GroupNormalization" not in operators


def test_resized_program_exports_smaller_and_equal(exported: OnnxArtifact, tmp_path: Path) -> None:
    _, program = make_program()
    group = next(group for group in depgraph(program).groups if group.name.startswith("conv"))
    resize(program, {group.name: [1, 2, 6]})
    artifact = export_onnx(program, tmp_path)
    x, relu = torch.randn(3, 3, 5, 6), torch.randn(3, 5)
    want = program(x, relu, linear=True)
    logits, aux, best, _ = artifact.runner()(x, relu)
    torch.testing.assert_close(logits, want["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aux, want["aux"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(best, want["x"])
    sizes = [a.manifest["files"]["model.onnx.data"]["bytes"] for a in (artifact, exported)]
    assert sizes[0] < sizes[1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(150, 64)
        self.head = nn.Linear(64, 150, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    """Below 8192 elements the exporter folds the transposed copy."""
    artifact = export_onnx(capture(Tied(), (torch.randint(0, 50, (2, 4)),)), tmp_path)
    stored = artifact.manifest["files"]["model.onnx.data"]["bytes"]
    assert 150 * 64 * 4 <= stored < 2 * 150 * 64 * 4
    assert artifact.max_difference < 1e-5


class Squeeze(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1) * 2


@pytest.mark.parametrize("directory_exists", [False, True])
def test_wrong_result_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory_exists: bool
) -> None:
    target = tmp_path / "deep" / "out"
    if directory_exists:
        target.mkdir(parents=True)
    wrong = {torch.ops.aten.squeeze.dim: Substitute(lambda call: True, _slightly_larger)}
    monkeypatch.setattr("graphwright.backends.onnx_cleanup.SUBSTITUTES", {**SUBSTITUTES, **wrong})
    with pytest.raises(
        ExportError, match=r"'output_0' on the example inputs has a relative difference of 0\.001, at most"
    ):
        export_onnx(capture(Squeeze(), (torch.randn(2, 3, 4),)), target)
    assert list(tmp_path.rglob("*")) == ([target.parent, target] if directory_exists else [])


def _slightly_larger(x: Tensor, dim: int) -> Tensor:
    return x * 1.001


def test_result_that_is_wrong_only_at_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {torch.ops.aten.squeeze.dim: Substitute(lambda call: True, _right_for_two)}
    monkeypatch.setattr("graphwright.backends.onnx_cleanup.SUBSTITUTES", {**SUBSTITUTES, **wrong})
    program = capture(Squeeze(), (torch.randn(2, 3, 4),))
    with pytest.raises(ExportError, match="on the second shape batch=3, seed 1 has a relative difference"):
        export_onnx(program, tmp_path)
    artifact = export_onnx(program, tmp_path, second_shape=False)
    assert artifact.manifest["notes"] == ["the dynamic dimensions were not checked: second_shape=False"]


def _right_for_two(x: Tensor, dim: int) -> Tensor:
    return x * (x.shape[0] / 2)


class Patches(nn.Module):
    """Capture takes any width, with a guard that it is 8: the positions are for four patches of two."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] // 2, 2).sum(-1) + self.positions


def test_dimension_that_the_program_cannot_vary_is_refused(tmp_path: Path) -> None:
    program = capture(Patches(), (torch.randn(2, 8),), dynamic={"x": {0: "batch", 1: "width"}})
    with pytest.raises(ExportError, match=r"dynamic dimensions \['batch', 'width'\] but does not run itself.*width=16"):
        export_onnx(program, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_guards_that_the_file_cannot_hold_are_in_the_manifest(tmp_path: Path) -> None:
    program = capture(Patches(), (torch.randn(2, 8),), dynamic={"x": {0: "batch", 1: "width"}})
    artifact = export_onnx(program, tmp_path, second_shape={"batch": 5})
    assert "(width // 2) == 4" in artifact.manifest["guards"]


def test_own_inputs_are_compared_as_well(exported: OnnxArtifact, tmp_path: Path) -> None:
    program = capture(Squeeze(), (torch.randn(2, 3, 4),))
    artifact = export_onnx(program, tmp_path, check_inputs=[((torch.randn(7, 3, 4),), {})])
    assert [check["inputs"] for check in artifact.manifest["checks"]][2] == "check_inputs[0]"
    with pytest.raises(InputError, match="'x' must have shape"):
        export_onnx(program, tmp_path, check_inputs=[((torch.randn(7, 4, 4),), {})])


def test_output_of_zeros_is_noted(tmp_path: Path) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 0, x + 1

    artifact = export_onnx(capture(Zero(), (torch.randn(2, 4),)), tmp_path)
    assert artifact.manifest["notes"] == ["zero on the example inputs, so that comparing shows little: output_0"]


def test_operator_without_onnx_form_is_named_with_its_place(tmp_path: Path) -> None:
    class Lone(nn.Module):
        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return torch.zeros(3, 4).index_reduce(0, i, x, "mean")

    program = capture(Lone(), (torch.randn(2, 4), torch.tensor([0, 2])), dynamic={})
    with pytest.raises(ExportError, match=r"index_reduce(.|\n)*test_onnx_export\.py(.|\n)*replace the operator"):
        export_onnx(program, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_part_of_an_operator_without_onnx_form_is_named_with_its_place(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x.mT @ x)

    # The exporter takes eigvalsh for a part of eigh, which the captured graph does not name.
    with pytest.raises(ExportError) as caught:
        export_onnx(capture(Spectrum(), (torch.randn(2, 3, 4),)), tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "torch.onnx has no ONNX form for aten._linalg_eigh.default"
    assert "test_onnx_export.py" in lines[1] and lines[2].startswith("replace the operator")


def test_bfloat16_is_refused_with_advice(tmp_path: Path) -> None:
    program = capture(nn.Linear(4, 3).bfloat16(), (torch.randn(2, 4).bfloat16(),))
    with pytest.raises(ExportError, match="does not load: .*convert the model to float32"):
        export_onnx(program, tmp_path / "out", providers=["cpu"])
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = capture(Squeeze(), (torch.randn(2, 3, 4),))
    with pytest.raises(ValueError, match="opset must be at least 18, got 17"):
        export_onnx(program, tmp_path / "out", opset=17)
    with pytest.raises(ValueError, match=r"sizes names \['bacth'\]"):
        export_onnx(program, tmp_path / "out", second_shape={"bacth": 3})
    with pytest.raises(ProviderError, match="has no NoSuchProvider"):
        export_onnx(program, tmp_path / "out", providers=["NoSuchProvider"])
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="needs onnx, onnxscript, onnx_ir; pip install"):
        export_onnx(capture(Squeeze(), (torch.randn(2, 3, 4),)), tmp_path)


def test_caller_and_program_are_not_changed(tmp_path: Path) -> None:
    model, program = make_program()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    graph, logger = str(program.graph_module.graph), logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    export_onnx(program, tmp_path, second_shape=False)
    assert str(program.graph_module.graph) == graph
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert logger.level == level
