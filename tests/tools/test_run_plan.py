"""Recipes whose passes make a plan: removal before it, exports, figures, the report's map, checks, and reruns."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphwright as gw
from graphwright.graph.plan import Plan
from graphwright.graph.serialize import load_plan
from graphwright.tools.cli import app
from graphwright.tools.outputs import load_output, measured_speedup, output_cost, plan_facts
from graphwright.tools.recipe import read_recipe
from graphwright.tools.report import write_report
from graphwright.tools.report_plan import evaluations, schedule_map
from graphwright.tools.run import Outcome, Runner
from graphwright.tools.zoo import ZOO

DENOISER = """
import torch
from torch import nn


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 8, 3, padding=1)
        self.down, self.deep = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.leave = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, sample, timestep):
        entered = self.enter(sample) + timestep.float().cos()[:, None, None, None]
        deep = self.up(torch.relu(self.deep(torch.relu(self.down(entered)))))
        return self.leave(torch.cat([deep, entered], 1))


def make():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Denoiser().eval()
    return model, (torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4])), {}
"""

RECIPE = """
model: graphwright_denoiser:make
passes:
  - remove-channels: {ratio: 0.5, ignore: ["enter"]}
  - insert-feature-cache: {interval_steps: 3}
  - eliminate-dead-code
export: {onnx: {providers: [cpu]}, torchscript: true}
measure: {runs: 3, threads: 1}
"""


@pytest.fixture(scope="module", autouse=True)
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "graphwright_denoiser.py").write_text(DENOISER, encoding="utf-8")
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("graphwright_denoiser", None)


@pytest.fixture(scope="module")
def outcome(denoiser: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Runner(read_recipe(RECIPE, "cached"), tmp_path_factory.mktemp("plan") / "run")()


@pytest.fixture(scope="module")
def data(outcome: Outcome) -> dict[str, Any]:
    return write_report(outcome)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_removal_and_cache_compose(outcome: Outcome, data: dict[str, Any]) -> None:
    assert outcome.ok and data["ok"]
    plan = load_output(outcome.directory / "pass-2-insert-feature-cache" / "program")
    assert isinstance(plan, Plan) and set(plan.stages) == {"refresh", "reuse"}
    shapes = {name: tuple(t.shape) for name, t in plan.stages["refresh"].program.tensors().items()}
    assert shapes["deep.weight"] == (8, 8, 3, 3) and shapes["leave.weight"] == (2, 12, 3, 3)
    assert set(plan.stages["reuse"].program.tensors()) == {
        f"{n}.{p}" for n in ("enter", "leave") for p in ("weight", "bias")
    }


def test_figures_are_the_mean_of_an_evaluation(outcome: Outcome, data: dict[str, Any]) -> None:
    # For a batch of 2: 3x3 convolutions at 8x8 in and out of a reuse; below them at 4x4, and the 2x2 way up.
    reuse = 2 * 64 * (2 * 8 + 12 * 2) * 9
    full = reuse + 2 * (16 * (8 * 8 + 8 * 8) * 9 + 64 * 8 * 4)
    assert data["plan"]["stages"]["reuse"]["cost"]["total_macs"] == reuse
    assert data["plan"]["stages"]["refresh"]["cost"]["total_macs"] == full
    assert data["cost"]["after"]["total_macs"] == round((full + 2 * reuse) / 3)
    assert data["plan"]["predicted_speedup"] == pytest.approx(full / ((full + 2 * reuse) / 3), rel=1e-6)
    assert data["plan"]["registers"] == {"cached_feature": 2 * 4 * 8 * 8 * 4}
    assert set(data["plan"]["measured_speedup"]) == {"PyTorch", "ONNX Runtime"}


def test_measured_speed_is_that_of_the_schedule() -> None:
    facts = {"shares": {"refresh": 0.25, "reuse": 0.75}}
    times = {"refresh, A": {"median_ms": 8.0}, "reuse, A": {"median_ms": 2.0}, "original, A": {"median_ms": 9.0}}
    assert measured_speedup(facts, times) == {"A": pytest.approx(8.0 / (0.25 * 8 + 0.75 * 2))}
    assert measured_speedup(facts, {"refresh, A": {"median_ms": 8.0}}) == {}


def test_every_stage_is_exported_and_compared(outcome: Outcome, data: dict[str, Any]) -> None:
    names = {"onnx-original", "onnx/refresh", "onnx/reuse", "torchscript/refresh", "torchscript/reuse"}
    assert set(data["exports"]) == names
    for name in names:
        assert max(check["max_difference"] for check in data["exports"][name]["checks"]) < 1e-4
    result = invoke("check", str(outcome.directory), "--json")
    assert result.exit_code == 0, result.output
    whats = [finding["what"] for finding in json.loads(result.stdout)["findings"]]
    assert any(what.startswith("onnx/reuse: compared with the program at batch=3") for what in whats)


def test_a_changed_stage_file_is_found(outcome: Outcome) -> None:
    file = outcome.directory / "onnx" / "reuse.onnx"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1])
        result = invoke("check", str(outcome.directory))
        assert result.exit_code != 0 and "reuse.onnx was changed" in result.output
    finally:
        file.write_bytes(whole)


def test_the_map_has_a_cell_for_each_register_and_evaluation(outcome: Outcome, data: dict[str, Any]) -> None:
    page = (outcome.directory / "report.html").read_text(encoding="utf-8")
    assert "<h2>Plan</h2>" in page and "times as fast as without the cache" in page
    shown = schedule_map(data["plan"])
    cells = re.findall(r'<rect class="(\w+)"', shown)
    assert cells == ["after" if i % 3 == 0 else "before" for i in range(20)]
    assert "evaluation 3, refresh: cached_feature computed" in shown
    assert "evaluation 4, reuse: cached_feature taken" in shown
    assert shown in page


def test_every_evaluation_has_what_it_takes_and_costs(outcome: Outcome, data: dict[str, Any]) -> None:
    page = (outcome.directory / "report.html").read_text(encoding="utf-8")
    shown = evaluations(data["plan"])
    assert shown in page
    macs = {name: facts["cost"]["total_macs"] for name, facts in data["plan"]["stages"].items()}
    speed = round(macs["refresh"] / macs["reuse"], 2)
    assert _cells(shown)[3:5] == [
        ["3", "refresh", "0", f"{macs['refresh']:,}", "1"],
        ["4", "reuse", "1", f"{macs['reuse']:,}", f"{speed:g}"],
    ]
    assert len(_cells(shown)) == 20


def test_branches_taken_are_counted_by_kind() -> None:
    case = ZOO["dit"].build()
    program = gw.capture(case.model, case.args, case.kwargs, case.dynamic)
    reuse = ((), (0, 3), (), (0, 1, 2), (0, 1, 2, 3))
    facts = plan_facts(gw.Pipeline([gw.InsertLayerCache(reuse=reuse)])(program).plan)
    assert facts is not None
    cells = _cells(evaluations(facts))
    # Attention is branch 0 and 2, feed-forward 1 and 3.
    assert [row[2:4] for row in cells] == [["0", "0"], ["1", "1"], ["0", "0"], ["2", "1"], ["2", "2"]]
    costs = [facts["stages"][stage]["cost"]["total_macs"] for stage in facts["ran"]]
    assert [row[4] for row in cells] == [f"{value:,}" for value in costs]
    assert costs[0] == costs[2] > costs[1] > costs[3] > costs[4]


def _cells(shown: str) -> list[list[str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", shown)[1:]
    return [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines]


def test_a_rerun_finds_everything_done(outcome: Outcome, denoiser: None) -> None:
    again = Runner(read_recipe(RECIPE, "cached"), outcome.directory)()
    assert all(stage.reused for stage in again.stages)


def test_a_plan_of_a_run_is_exported_by_its_directory(outcome: Outcome, tmp_path: Path) -> None:
    result = invoke("export", str(outcome.directory), "--to", "onnx", "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["stages"]) == {"refresh", "reuse"}
    assert (tmp_path / "out" / "weights.data").is_file()


def test_what_needs_one_program_says_that_there_is_a_plan(outcome: Outcome) -> None:
    result = invoke("groups", str(outcome.directory))
    assert result.exit_code != 0 and "holds a plan of 2 programs (refresh, reuse)" in result.output


def test_a_dry_run_says_what_the_plan_would_be(denoiser: None) -> None:
    result = invoke(
        "run", "graphwright_denoiser:make", "--pass", "insert-feature-cache{interval_steps=4}", "--dry-run", "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["plan"]["shares"] == {"refresh": 0.25, "reuse": 0.75}
    assert data["cost"]["after"]["total_macs"] < data["cost"]["before"]["total_macs"]


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ("{interval: 2, per_step: 2}", {"kind": "uniform", "interval": 2, "per_step": 2}),
        ("{names: [refresh, reuse, reuse]}", {"kind": "listed", "names": ["refresh", "reuse", "reuse"]}),
    ],
)
def test_a_recipe_gives_any_schedule(options: str, schedule: dict[str, Any], denoiser: None, tmp_path: Path) -> None:
    text = f"""
    model: graphwright_denoiser:make
    passes:
      - insert-feature-cache: {{schedule: {options}}}
    measure: false
    """
    outcome = Runner(read_recipe(text, "scheduled"), tmp_path / "run")()
    plan = load_plan(outcome.directory / "pass-1-insert-feature-cache" / "program")
    assert json.loads(json.dumps(plan.schedule.encode())) == schedule
    assert output_cost(plan)["total_macs"] == outcome["pass-1-insert-feature-cache"].result["cost"]["total_macs"]


def test_a_pass_after_the_plan_that_needs_one_program_is_refused(denoiser: None, tmp_path: Path) -> None:
    result = invoke(
        "run",
        "graphwright_denoiser:make",
        "--pass",
        "insert-feature-cache",
        "--pass",
        "remove-channels",
        "--out",
        str(tmp_path / "run"),
    )
    assert result.exit_code != 0
    assert "put it before the pass that makes the plan" in result.output


def test_random_state_is_left_alone(denoiser: None, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make: Callable[..., Any] = importlib.import_module("graphwright_denoiser").make
    make()
    Runner(
        read_recipe("model: graphwright_denoiser:make\npasses: [insert-feature-cache]\nmeasure: false", "r"),
        tmp_path / "r",
    )()
    assert torch.equal(torch.get_rng_state(), before)
