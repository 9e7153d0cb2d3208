"""Every program of a plan in every form that torch and ONNX Runtime run, where modules with hooks of other libraries fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import graphwright as gw
from graphwright.backends.torchscript import export_torchscript
from graphwright.tools.bench.cache_models import TINY_SD, conditional
from graphwright.tools.zoo import ZOO

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

# In units of the largest value. Other kernels, other orders of addition; the caches themselves differ by far more.
CLOSE = 1e-4


def unet() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = conditional(TINY_SD)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
    }
    return model, inputs


def transformer(name: str) -> tuple[Any, dict[str, Any]]:
    case = ZOO[name].build()
    return case.model, dict(case.kwargs)


CASES: Mapping[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], Any, int]] = {
    "unet": (unet, gw.InsertFeatureCache(branch=2), 2),
    "dit": (lambda: transformer("dit"), gw.InsertLayerCache(reuse=((), (0, 3), (0, 1, 2, 3))), 3),
    "pixart": (lambda: transformer("pixart"), gw.InsertLayerCache(kinds=("attention",)), 2),
    "sd3": (lambda: transformer("sd3"), gw.InsertLayerCache(), 2),
    "flux": (lambda: transformer("flux"), gw.InsertLayerCache(), 2),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[gw.Plan, dict[str, Any], dict[str, Tensor]]:
    make, step, count = CASES[request.param]
    model, inputs = make()
    plan = gw.Pipeline([step])(gw.capture(model, (), inputs)).plan
    assert len(plan.stages) == count
    # Registers of another evaluation, so that a reuse is no refresh.
    before = pytree.tree_map(lambda v: v.flip(-1) if isinstance(v, Tensor) and v.dim() > 1 else v, inputs)
    with torch.no_grad():
        _, written = plan.stages["refresh"].program(**before)
    return plan, inputs, written


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def near(got: Any, want: Any) -> None:
    for g, w in zip(leaves(got), leaves(want), strict=True):
        assert float(w.abs().max()) > 1e-3
        torch.testing.assert_close(g, w, rtol=0, atol=CLOSE * float(w.abs().max()))


def calls(case: Any) -> list[tuple[str, gw.Program, dict[str, Any], Any]]:
    """Return name, program, inputs and result of every stage; the stages' results differ."""
    plan, inputs, written = case
    found = []
    for name, stage in plan.stages.items():
        given = {**inputs, **{register: written[register] for register in stage.reads}}
        with torch.no_grad():
            found.append((name, stage.program, given, stage.program(**given)))
    full = leaves(found[0][3])[0]
    assert all(float((leaves(out)[0] - full).abs().max()) > 1e-4 for *_, out in found[1:])
    return found


def test_every_program_compiles_to_one_graph(case: Any) -> None:
    for _, program, inputs, want in calls(case):
        torch._dynamo.reset()
        compiled = torch.compile(program.module(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            near(compiled(**inputs), want)


def test_every_program_is_exported_by_torch_again(case: Any) -> None:
    for _, program, inputs, want in calls(case):
        again = torch.export.export(program.module(), (), inputs, strict=False).module()
        with torch.no_grad():
            near(again(**inputs), want)


def test_every_program_runs_as_torchscript(case: Any, tmp_path: Path) -> None:
    plan, _, _ = case
    artifact = export_torchscript(plan, tmp_path)
    assert artifact.max_difference < CLOSE
    loaded = artifact.plan()
    for name, _, inputs, want in calls(case):
        near(loaded.stages[name].program(**inputs), want)


def test_every_program_runs_in_onnx_runtime_with_one_file_of_weights(case: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    plan, _, _ = case
    artifact = gw.export_onnx(plan, tmp_path, providers=["cpu"])
    assert artifact.max_difference < CLOSE
    assert {file.suffix for file in tmp_path.iterdir()} == {".onnx", ".data", ".json"}
    assert [file.name for file in tmp_path.glob("*.data")] == ["weights.data"]
    loaded = gw.load_onnx_plan(tmp_path, ["cpu"])
    for name, _, inputs, want in calls(case):
        near(loaded.stages[name].program(**inputs), want)


def test_a_program_compiles_with_the_default_backend() -> None:
    model, inputs = unet()
    plan = gw.Pipeline([gw.InsertFeatureCache(branch=0)])(gw.capture(model, (), inputs, dynamic={})).plan
    with torch.no_grad():
        _, written = plan.stages["refresh"].program(**inputs)
        given = {**inputs, **written}
        want = plan.stages["reuse"].program(**given)
        torch._dynamo.reset()
        near(torch.compile(plan.stages["reuse"].program.module(), fullgraph=True)(**given), want)


# ---------------------------------------------------------------------- the same with the modules of others


def test_the_hooked_module_of_the_package_is_not_exported() -> None:
    from DeepCache import DeepCacheSDHelper

    model, inputs = unet()
    scheduler = SimpleNamespace(timesteps=torch.tensor([900, 500]))
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model, scheduler=scheduler))
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    rest = inputs["encoder_hidden_states"]
    try:
        with pytest.raises(Exception, match="(?i)data-dependent|item"):
            torch.export.export(model, (inputs["sample"], torch.tensor(500), rest), strict=False)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="(?i)graph|item|unsupported"), torch.no_grad():
            torch.compile(model, fullgraph=True, backend="eager")(inputs["sample"], torch.tensor(500), rest)
    finally:
        helper.disable()


def test_first_block_cache_is_not_exported() -> None:
    hooks: Any = import_module("diffusers.hooks")
    model, inputs = transformer("flux")
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(0.1))
    with model.cache_context("run"):
        with torch.no_grad():
            model(**inputs)
        with pytest.raises(Exception, match="(?i)data-dependent|guard"):
            torch.export.export(model, (), inputs, strict=False)
