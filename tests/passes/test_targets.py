"""Removal towards a target: MACs, parameters or latency. The oracle is a fine sweep over ratios."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.cost import cost
from graphwright.graph.errors import PreconditionError
from graphwright.graph.program import Program
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.remove_channels import RemoveChannels


class Block(nn.Module):
    """Convolutions of several widths, a residual stream with a group norm, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.outer = nn.Conv2d(24, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 12) for _ in range(3))
        self.proj = nn.Linear(12, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x + self.outer(torch.relu(self.inner(x)))).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in self.qkv)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


@cache
def program() -> Program:
    torch.manual_seed(0)
    return capture(Block().eval(), (torch.randn(2, 3, 6, 6),))


def removed(context: Context | None = None, **options: Any) -> tuple[Program, dict[str, float]]:
    done = Pipeline([RemoveChannels(**options)])(program(), context)
    return done.program, dict(done.records[0].result.stats)


def macs(of: Program) -> float:
    return cost(of).total_macs


def parameters(of: Program) -> float:
    return cost(of).parameters


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("quantity", ["macs", "parameters"])
@pytest.mark.parametrize("fraction", [0.8, 0.45])
def test_the_result_is_the_least_removal_that_reaches_the_target(scope: str, quantity: str, fraction: float) -> None:
    measured = macs if quantity == "macs" else parameters
    goal = fraction * measured(program())
    target: dict[str, Any] = {quantity: fraction}
    after, stats = removed(scope=scope, **target)
    assert measured(after) == stats[f"{quantity}_after"] <= goal
    assert stats[f"{quantity}_requested"] == pytest.approx(goal)
    swept = {measured(removed(scope=scope, ratio=i / 50)[0]) for i in range(50)}
    # No ratio of the sweep comes closer from below.
    assert measured(after) >= max(found for found in swept if found <= goal)
    assert measured(after) > 0.7 * goal  # the group norm goes in fours


def test_proportions_of_the_ratios_stay() -> None:
    after, _ = removed(macs=0.5, ratio=0.4, head_dim_ratio=0.0)
    shapes = {name: tuple(t.shape) for name, t in after.tensors().items()}
    assert shapes["qkv.0.weight"][0] == 12 and shapes["inner.weight"][0] < 24
    one, _ = removed(macs=0.5, ratio=0.1, head_dim_ratio=0.05)
    two, _ = removed(macs=0.5, ratio=0.4, head_dim_ratio=0.2)
    assert [t.shape for t in one.tensors().values()] == [t.shape for t in two.tensors().values()]
    assert one.tensors()["qkv.0.weight"].shape[0] < 12


def test_steps_go_there_in_equal_parts() -> None:
    seen: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "removal":
            seen.append(done)

    after, stats = removed(Context(progress=progress), macs=0.4, steps=3)
    assert seen == [1, 2, 3]
    assert 0.8 * 0.4 * macs(program()) < macs(after) <= 0.4 * macs(program()) == pytest.approx(stats["macs_requested"])


def test_latency_is_what_the_context_measures() -> None:
    measured: list[float] = []

    def seconds(of: Program) -> float:
        measured.append(parameters(of) * 1e-6)
        return measured[-1]

    after, stats = removed(Context(latency=seconds), latency=0.6)
    assert stats["latency_before"] == measured[0] and stats["latency_after"] == parameters(after) * 1e-6
    assert 0.4 * measured[0] < stats["latency_after"] <= stats["latency_requested"] == pytest.approx(0.6 * measured[0])
    with pytest.raises(PreconditionError, match="Context\\(latency="):
        removed(latency=0.6)


def test_a_target_out_of_reach_says_how_far_it_goes() -> None:
    with pytest.raises(PreconditionError, match=r"macs=0.05 asks for .* the most that the options allow leaves"):
        removed(macs=0.05, max_ratio=0.5)
    with pytest.raises(PreconditionError, match="raise max_ratio"):
        removed(macs=0.5, ratio=0.5, ignore=("stem", "inner", "outer", "norm"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"macs": 0.5, "parameters": 0.5}, "one target can be reached at a time, got macs and parameters"),
        ({"macs": 1.0}, "macs must be a fraction in"),
        ({"latency": 0}, "latency must be a fraction in"),
    ],
)
def test_wrong_targets_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RemoveChannels(**options)
