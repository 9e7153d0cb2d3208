"""Plans in ONNX Runtime against the same plans in PyTorch, over whole sampling runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.onnx_export import OnnxArtifact, export_onnx, load_onnx_plan
from graphwright.backends.onnx_runner import OnnxRunner
from graphwright.frontends.capture import capture
from graphwright.graph.errors import ArtifactError, ExportError, InputError
from graphwright.graph.plan import Plan
from graphwright.graph.program import set_tensor
from graphwright.graph.schedules import Uniform
from graphwright.passes.base import Pipeline
from graphwright.passes.insert_feature_cache import InsertFeatureCache
from graphwright.passes.insert_layer_cache import InsertLayerCache

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )
    return model.eval()


@pytest.fixture(scope="module")
def plan(unet: nn.Module) -> Plan:
    dynamic = {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": {0: "batch"}}
    program = capture(unet, (torch.randn(2, 2, 8, 8), torch.tensor([5, 7])), None, dynamic)
    return Pipeline([InsertFeatureCache(interval_steps=3, branch=1)])(program).plan


@pytest.fixture(scope="module")
def artifact(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    return export_onnx(plan, tmp_path_factory.mktemp("plan"), providers=["cpu"])


def sampled(denoiser: nn.Module, sizes: tuple[int, ...], steps: int = 8) -> Tensor:
    sample = torch.randn(sizes, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for time in range(900, 900 - 100 * steps, -100):
            sample = sample - 0.2 * denoiser(sample, torch.full((sizes[0],), time)).sample
    return sample


@pytest.mark.parametrize("sizes", [(2, 2, 8, 8), (5, 2, 8, 8), (1, 2, 16, 8)])
def test_whole_run_is_that_of_the_plan_in_pytorch(plan: Plan, artifact: OnnxArtifact, unet, sizes) -> None:
    module = artifact.plan(["cpu"]).module()
    got, want, full = sampled(module, sizes), sampled(plan.module(), sizes), sampled(unet, sizes)
    assert module.history() == ("refresh", "reuse", "reuse") * 2 + ("refresh", "reuse")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert float((want - full).abs().max()) > 1e-3


def test_stages_share_one_file_of_weights(plan: Plan, artifact: OnnxArtifact) -> None:
    folder = artifact.directory
    files = {"refresh.onnx", "reuse.onnx", "weights.data", "manifest.json"}
    assert {file.name for file in folder.iterdir()} == files
    parameters = sum(t.numel() * t.element_size() for t in plan.stages["refresh"].program.tensors().values())
    assert parameters * 0.9 < (folder / "weights.data").stat().st_size < parameters * 1.05
    assert artifact.manifest["weight_bytes"]["all"] > artifact.manifest["weight_bytes"]["stored"]
    names = {}
    for stage in plan.stages:
        model = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
        names[stage] = {i.name for i in model.graph.initializer}
        locations = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
        assert locations == {"weights.data"}
    assert len(names["reuse"]) < len(names["refresh"]) / 2


def test_manifest_says_how_to_run_it(artifact: OnnxArtifact) -> None:
    manifest = json.loads((artifact.directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["kind"] == "onnx-plan" and manifest["timestep"] == "timestep"
    assert manifest["schedule"] == {"kind": "uniform", "interval": 3, "per_step": 1}
    assert manifest["registers"]["cached_feature"]["dtype"] == "float32"
    assert manifest["stages"]["refresh"]["writes"] == manifest["stages"]["reuse"]["reads"] == ["cached_feature"]
    for facts in manifest["stages"].values():
        assert facts["checks"] and all(check["max_difference"] < 1e-4 for check in facts["checks"])


def test_wrong_input_is_refused_as_by_the_denoiser(artifact: OnnxArtifact) -> None:
    module = artifact.plan(["cpu"]).module()
    with pytest.raises(InputError, match="input 'timestep' of UNet2DModel is missing"):
        module(torch.randn(2, 2, 8, 8))
    with pytest.raises(InputError, match=r"must have shape \[batch, 2, height, width\]"):
        module(torch.randn(2, 3, 8, 8), torch.tensor([1, 1]))


def test_plan_is_no_program(artifact: OnnxArtifact) -> None:
    with pytest.raises(ArtifactError, match="holds a plan"):
        artifact.path  # noqa: B018
    with pytest.raises(ArtifactError):
        OnnxRunner(artifact.directory)


@pytest.mark.slow
def test_float16_files_share_weights_as_well(plan: Plan, tmp_path: Path) -> None:
    half = export_onnx(plan, tmp_path, providers=["cpu"], fp16=True)
    got, want = sampled(half.plan(["cpu"]).module(), (2, 2, 8, 8)), sampled(plan.module(), (2, 2, 8, 8))
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * float(want.abs().max()))
    parameters = sum(t.numel() * t.element_size() for t in plan.stages["refresh"].program.tensors().values())
    assert (tmp_path / "weights.data").stat().st_size < 0.6 * parameters


def test_stage_that_cannot_be_exported_is_named_and_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    broken = plan.copy()
    reuse = broken.stages["reuse"].program
    name = next(iter(reuse.tensors()))
    set_tensor(reuse.graph_module, name, nn.Parameter(reuse.tensors()[name].to("meta")))
    with pytest.raises(ExportError, match="stage 'reuse': .*without values"):
        export_onnx(broken, tmp_path / "out", providers=["cpu"])
    assert not (tmp_path / "out").exists()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for branch in self.branches:
            sample = sample + branch(sample) * timestep.float().cos()[:, None]
        return sample


def test_layer_cache_of_several_patterns(tmp_path: Path) -> None:
    torch.manual_seed(1)
    program = capture(Residual(), (torch.randn(2, 6), torch.tensor([3, 3])))
    step = InsertLayerCache(reuse=((), (0, 2), (), (1, 2, 3), (0, 2)), extrapolation=1)
    plan = Pipeline([step])(program).plan
    export_onnx(plan, tmp_path, providers=["cpu"])
    loaded = load_onnx_plan(tmp_path, ["cpu"])
    assert (loaded.extrapolation, loaded.schedule) == (1, plan.schedule)
    assert set(loaded.stages) == {"refresh", "reuse_0", "reuse_1"}
    got, want = loaded.module(), plan.module()
    x = torch.randn(3, 6)
    outputs = []
    with torch.no_grad():
        for time in (9, 7, 5, 3, 1):
            args = (x * time, torch.full((3,), time))
            outputs.append(want(*args))
            torch.testing.assert_close(got(*args), outputs[-1], rtol=1e-5, atol=1e-5)
        full = Plan(plan.stages, Uniform(1), plan.inputs, plan.timestep, plan.name).module()
        assert float((full(*args) - outputs[-1]).abs().max()) > 1e-3
