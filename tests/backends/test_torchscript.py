"""TorchScript: fixed shapes, checked, compared before it is written."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends import torchscript
from graphwright.backends.torchscript import TorchScriptRunner, export_torchscript
from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import ArtifactError, ExportError, InputError
from graphwright.graph.program import Program
from graphwright.graph.resize import resize
from graphwright.passes.base import Pipeline
from graphwright.passes.insert_layer_cache import InsertLayerCache


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, bias: Tensor, flag: bool = True) -> dict[str, object]:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return {"logits": self.head(h) + bias, "aux": (h.sum(1), None)}


def make_program(model: nn.Module | None = None) -> Program:
    torch.manual_seed(0)
    return capture(model or Net(), (torch.randn(2, 3, 8, 8), torch.randn(2, 5)), {"flag": True})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the deprecation of TorchScript is silenced, and nothing else is raised
        return export_torchscript(make_program(), tmp_path_factory.mktemp("ts") / "out").directory


def test_file_computes_what_the_model_does_in_plain_torch(exported: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    x, bias = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        logits, aux = torch.jit.load(exported / "model.torchscript.pt")(x, bias)
    expected = model(x, bias)
    # Freezing folds the batch norm into the convolution: other roundings of float32.
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux, expected["aux"][0], rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1


def test_manifest_says_what_was_traced_and_compared(exported: Path) -> None:
    facts = json.loads((exported / "torchscript.json").read_text())
    assert facts["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": [2, 3, 8, 8]},
        {"name": "bias", "dtype": "float32", "shape": [2, 5]},
    ]
    assert [entry["name"] for entry in facts["outputs"]] == ["logits", "aux.0"]
    assert facts["constants"] == {"flag": True} and facts["dropped_outputs"] == {"aux.1": None}
    assert facts["torch"] == torch.__version__
    assert len(facts["checks"]) == 2
    assert all(check["max_difference"] < 1e-5 for check in facts["checks"])
    assert sorted(file.name for file in exported.iterdir()) == ["model.torchscript.pt", "torchscript.json"]


def test_runner_takes_inputs_by_order_and_by_name(exported: Path) -> None:
    runner = TorchScriptRunner(exported)
    x, bias = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    assert runner.output_names == ("logits", "aux.0")
    for by_order, by_name in zip(runner(x, bias), runner(bias=bias, x=x), strict=True):
        assert torch.equal(by_order, by_name)
        assert not by_order.requires_grad


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (torch.randn(3, 3, 8, 8), torch.randn(3, 5)),
            {},
            r"'x' must have the shape \[2, 3, 8, 8\] it was traced with",
        ),
        ((torch.randn(2, 3, 8, 8).double(), torch.randn(2, 5)), {}, r"'x' must have dtype torch.float32"),
        ((torch.randn(2, 3, 8, 8),), {}, r"missing: \['bias'\]"),
        ((torch.randn(2, 3, 8, 8),), {"bais": torch.randn(2, 5)}, r"unknown or given twice: \['bais'\]"),
        ((torch.randn(2, 3, 8, 8),), {"x": 1}, r"given twice: \['x'\]"),
        ((torch.randn(2, 3, 8, 8), 3), {}, r"'bias' must be a tensor, got int"),
        ((1, 2, 3), {}, r"takes 2 tensors \['x', 'bias'\], got 3"),
    ],
)
def test_wrong_input_is_refused(exported: Path, args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TorchScriptRunner(exported)(*args, **kwargs)


def test_resized_program_exports_smaller(exported: Path, tmp_path: Path) -> None:
    program = make_program()
    (group,) = depgraph(program).groups
    resize(program, {group.name: [0, 2, 5]})
    artifact = export_torchscript(program, tmp_path)
    x, bias = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    want = program(x, bias, flag=True)
    logits, _aux = artifact.runner()(x, bias)
    assert program.tensors()["head.weight"].shape == (5, 3)
    torch.testing.assert_close(logits, want["logits"], rtol=1e-5, atol=1e-5)
    assert artifact.max_difference < 1e-5


def test_wrong_result_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = torchscript._trace

    def wrong(flat, inputs, file) -> None:
        with torch.no_grad():
            flat.module.head.bias = nn.Parameter(flat.module.head.bias * 1.01)
        trace(flat, inputs, file)

    monkeypatch.setattr(torchscript, "_trace", wrong)
    with pytest.raises(ExportError, match="output 'logits' on the example inputs has a relative difference of"):
        export_torchscript(make_program(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.layer(y) + 1, lambda y: self.layer(y) - 1, (x,))


def test_condition_is_refused_with_its_place(tmp_path: Path) -> None:
    program = capture(Branches(), (torch.randn(4, 5),))
    with pytest.raises(
        ExportError, match=r"^TorchScript is a trace and cannot hold 'cond' of Branches; .*\n  at %cond = cond "
    ):
        export_torchscript(program, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_refused(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    with (copy / "model.torchscript.pt").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtifactError, match=r"model\.torchscript\.pt' must have"):
        TorchScriptRunner(copy)


def test_callers_model_keeps_its_mode_and_weights(tmp_path: Path) -> None:
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_torchscript(make_program(model), tmp_path)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for branch in self.branches:
            sample = sample + branch(sample) * timestep.float().cos()[:, None]
        return sample


def test_plan_is_a_file_for_each_stage_and_runs_like_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(1)
    program = capture(Residual(), (torch.randn(2, 6), torch.tensor([3, 3])))
    plan = Pipeline([InsertLayerCache(reuse=((), (0, 2), (), (1, 2, 3)))])(program).plan
    artifact = export_torchscript(plan, tmp_path)
    names = {"torchscript.json", *(f"{stage}.torchscript.pt" for stage in ("refresh", "reuse_0", "reuse_1"))}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert artifact.max_difference < 1e-5
    with pytest.raises(ArtifactError, match="holds a plan"):
        artifact.path  # noqa: B018
    got, want = artifact.plan().module(), plan.module()
    x = torch.randn(2, 6)
    with torch.no_grad():
        for time in (7, 5, 3, 1):
            args = (x * time, torch.full((2,), time))
            expected = want(*args)
            torch.testing.assert_close(got(*args), expected, rtol=1e-5, atol=1e-5)
        assert float((program(*args) - expected).abs().max()) > 1e-3
    assert got.history() == ("refresh", "reuse_0", "refresh", "reuse_1")
