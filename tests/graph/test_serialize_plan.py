"""Plans on disk: what is loaded runs, shares tensors and refuses like what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.errors import ArtifactError
from graphwright.graph.plan import Plan
from graphwright.graph.program import set_tensor
from graphwright.graph.schedules import Listed, Uniform, masked
from graphwright.graph.serialize import load_plan, load_program, save_plan, save_program
from graphwright.passes.base import Pipeline
from graphwright.passes.insert_feature_cache import InsertFeatureCache
from graphwright.passes.insert_layer_cache import InsertLayerCache


class UShaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        first = self.first(sample) + timestep.float().sin()[:, None, None, None]
        deep = self.up(torch.relu(self.middle(torch.relu(self.down(first)))))
        return {"sample": self.last(torch.cat([deep, first], dim=1))}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for branch in self.branches:
            sample = sample + branch(sample) * timestep.float().cos()[:, None]
        return sample


def of(model: nn.Module, step: InsertFeatureCache | InsertLayerCache, shape: tuple[int, ...]) -> Plan:
    program = capture(model, (torch.randn(2, *shape), torch.tensor([3, 3])))
    return Pipeline([step])(program).plan


def run(plan: Plan, shape: tuple[int, ...], steps: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    module = plan.module()
    outputs = []
    with torch.no_grad():
        for time in range(steps, 0, -1):
            result = module(torch.randn(3, *shape, generator=generator), torch.full((3,), time))
            outputs.append(result["sample"] if isinstance(result, dict) else result)
    return outputs


CASES = {
    "feature": (UShaped, InsertFeatureCache(interval_steps=2), (3, 8, 8)),
    "extrapolated": (UShaped, InsertFeatureCache(interval_steps=2, extrapolation=1), (3, 8, 8)),
    "mask": (UShaped, InsertFeatureCache(schedule=masked("10100")), (3, 8, 8)),
    "layers": (Residual, InsertLayerCache(reuse=((), (0, 2), (), (1,), (0, 1, 2))), (6,)),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_plan_runs_like_the_saved_one(case: str, tmp_path: Path) -> None:
    model, step, shape = CASES[case]
    torch.manual_seed(0)
    plan = of(model(), step, shape)
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    want, got = run(plan, shape), run(loaded, shape)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    full = run(Plan(plan.stages, Uniform(1), plan.inputs, plan.timestep, plan.name), shape)
    assert max(float((a - b).abs().max()) for a, b in zip(want, full, strict=True)) > 1e-3
    assert loaded.schedule == plan.schedule and loaded.registers == plan.registers
    assert (loaded.name, loaded.timestep, loaded.notes) == (plan.name, plan.timestep, plan.notes)
    assert loaded.extrapolation == plan.extrapolation


def test_stages_share_tensors_on_disk_and_in_memory(tmp_path: Path) -> None:
    plan = of(UShaped(), InsertFeatureCache(), (3, 8, 8))
    save_plan(plan, tmp_path)
    refresh, reuse = plan.stages["refresh"].program.tensors(), plan.stages["reuse"].program.tensors()
    assert set(load_file(tmp_path / "model.safetensors")) == set(refresh) > set(reuse)
    loaded = load_plan(tmp_path)
    for name, tensor in loaded.stages["reuse"].program.tensors().items():
        assert tensor is loaded.stages["refresh"].program.tensors()[name]


def test_stages_with_other_tensors_of_one_name_keep_both(tmp_path: Path) -> None:
    plan = of(UShaped(), InsertFeatureCache(), (3, 8, 8)).copy()
    reuse = plan.stages["reuse"].program
    set_tensor(reuse.graph_module, "last.bias", nn.Parameter(torch.full((3,), 7.0)))
    save_plan(plan, tmp_path)
    stages = load_plan(tmp_path).stages
    assert stages["reuse"].program.tensors()["last.bias"].eq(7).all()
    assert not stages["refresh"].program.tensors()["last.bias"].eq(7).any()


def test_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    plan = of(UShaped(), InsertFeatureCache(), (3, 8, 8))
    save_plan(plan, tmp_path / "plan")
    save_program(plan.stages["refresh"].program, tmp_path / "program")
    with pytest.raises(ArtifactError, match=r"holds no saved program: there is no program\.json"):
        load_program(tmp_path / "plan")
    with pytest.raises(ArtifactError, match=r"holds no saved plan: there is no plan\.json"):
        load_plan(tmp_path / "program")


def test_weights_of_another_save_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        save_plan(of(UShaped(), InsertFeatureCache(interval_steps=ord(name)), (3, 8, 8)), tmp_path / name)
    (tmp_path / "a" / "model.safetensors").replace(tmp_path / "b" / "model.safetensors")
    with pytest.raises(ArtifactError, match="does not belong to the document beside it"):
        load_plan(tmp_path / "b")


def test_schedule_that_names_no_stage_is_refused(tmp_path: Path) -> None:
    plan = of(UShaped(), InsertFeatureCache(), (3, 8, 8))
    plan.schedule = Listed(("refresh", "elsewhere"))
    save_plan(plan, tmp_path)
    with pytest.raises(ArtifactError, match="the schedule names 'elsewhere'"):
        load_plan(tmp_path)


def test_document_is_readable_json(tmp_path: Path) -> None:
    save_plan(of(UShaped(), InsertFeatureCache(interval_steps=4), (3, 8, 8)), tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert data["format"] == "graphwright plan"
    assert data["plan"]["schedule"] == {"kind": "uniform", "interval": 4, "per_step": 1}
    assert data["plan"]["stages"]["reuse"]["reads"] == ["cached_feature"]
