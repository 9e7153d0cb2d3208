"""Iterative removal: rounds of removal and training come to where one removal comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.cost import cost
from graphwright.graph.program import Program
from graphwright.passes.alternate import alternate
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.remove_channels import RemoveChannels
from graphwright.passes.train_weights import TrainWeights


def loss(module: Any, batch: Tensor) -> Tensor:
    return (module(batch) - 1).square().mean()


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 3))
    return capture(model.eval(), (torch.randn(4, 8),))


def test_ratios_add_up_to_those_of_one_removal(program: Program) -> None:
    context = Context(loss=loss, training=[torch.ones(4, 8)])
    removal = RemoveChannels(ratio=0.5, ratios={"2:hidden": 0.8})
    passes = alternate(removal, TrainWeights(steps=2, learning_rate=1e-3), 4)
    assert [p.name for p in passes] == ["remove-channels", "train-weights"] * 4
    rounds = Pipeline(passes)(program, context)
    widths = [
        [w.after for w in record.result.widths]  # type: ignore[attr-defined]
        for record in rounds.records
        if record.name == "remove-channels"
    ]
    # 60 loses an eighth a round, and 40 a fifth.
    assert widths == [[52, 32], [45, 24], [38, 16], [30, 8]] or widths == [[53, 32], [45, 24], [38, 16], [30, 8]]
    at_once = Pipeline([removal])(program).program
    assert {n: t.shape for n, t in rounds.program.tensors().items()} == {
        n: t.shape for n, t in at_once.tensors().items()
    }


def test_targets_are_met_in_equal_parts(program: Program) -> None:
    context = Context(loss=loss, training=[torch.ones(4, 8)])
    passes = alternate(RemoveChannels(macs=0.4), TrainWeights(steps=1), 3)
    whole, left = cost(program).total_macs, []
    work = program
    for step in passes:
        work = Pipeline([step])(work, context).program
        left.append(cost(work).total_macs / whole)
    for share, wanted in zip(left[::2], (0.8, 0.6, 0.4), strict=True):
        assert wanted - 0.04 < share <= wanted


def test_no_round_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        alternate(RemoveChannels(), TrainWeights(steps=1), 0)
