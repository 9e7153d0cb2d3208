"""Training in a run: it is told of, a run that was stopped goes on from the last checkpoint, and none is left over."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.graph.serialize import load_program
from graphwright.tools.recipe import read_recipe
from graphwright.tools.run import CHECKPOINTS, Runner, Silent

MODEL = '''
import torch
from pathlib import Path
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def make():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny().eval(), (torch.randn(2, 6, generator=torch.Generator().manual_seed(0)),), {}


def training(flag):
    """Fails at the 14th batch while the file is there."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 6, generator=generator) for _ in range(5)]
    seen = []

    def loss(module, batch):
        seen.append(1)
        if len(seen) == 14 and Path(flag).exists():
            raise OSError("power cut")
        return (module(batch) - batch[:, :3]).square().mean()

    return loss, batches
'''
RECIPE = """
model: stopped_model:make
training: {{factory: "stopped_model:training", options: {{flag: "{flag}"}}}}
passes:
  - remove-channels: {{ratio: 0.5}}
  - train-weights: {{steps: 30, learning_rate: 0.01, average: 0.9, save_every: 5}}
measure: false
"""


class Told(Silent):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def progress(self, what: str, done: int, total: int) -> None:
        self.calls.append((what, done, total))


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stopped_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    flag = tmp_path / "flag"
    recipe = read_recipe(RECIPE.format(flag=flag), "stopped")
    importlib.invalidate_caches()

    told = Told()
    whole = Runner(recipe, tmp_path / "whole", told)()
    assert [call for call in told.calls if call[0] == "train"] == [("train", i + 1, 30) for i in range(30)]

    flag.touch()
    with pytest.raises(OSError, match="power cut"):
        Runner(recipe, tmp_path / "stopped")()
    assert list((tmp_path / "stopped" / CHECKPOINTS).iterdir())
    flag.unlink()
    again = Runner(recipe, tmp_path / "stopped")()

    def trained(outcome: Any) -> dict[str, Any]:
        return outcome["pass-2-train-weights"].result["stats"]

    assert (trained(whole)["steps_resumed"], trained(again)["steps_resumed"]) == (0, 10)
    one, other = (
        load_program(tmp_path / name / "pass-2-train-weights" / "program").parameters() for name in ("whole", "stopped")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["first.weight"].shape == (6, 6)
    assert not any((tmp_path / "stopped" / CHECKPOINTS).rglob("*.bin"))
    sys.modules.pop("stopped_model", None)
