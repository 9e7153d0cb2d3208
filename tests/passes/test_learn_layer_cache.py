"""The pass that trains a router and inserts the cache: against the same router applied by hand, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.errors import PreconditionError
from graphwright.graph.program import Program
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.learn_layer_cache import LearnLayerCache
from graphwright.passes.train_layer_router import train_layer_router

EVALUATIONS = 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for branch in self.branches:
            sample = sample + branch(sample) * timestep.float().cos()[:, None]
        return sample


def loop(denoise: Any, generator: torch.Generator) -> Tensor:
    x = torch.randn(4, 6, generator=generator)
    for time in range(EVALUATIONS, 0, -1):
        x = x - 0.1 * denoise(x, torch.full((4,), time))
    return x


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Residual().eval(), (torch.randn(2, 6), torch.tensor([3, 3])))


@pytest.mark.parametrize(("objective", "lam"), [("result", 1e-3), ("picture", 1e-6)])
def test_plan_is_that_of_the_router(program: Program, objective: str, lam: float) -> None:
    options: dict[str, Any] = {"rounds": 30, "lr": 0.1, "seed": 2, "lam": lam, "objective": objective}
    seen: list[tuple[str, int, int]] = []
    ctx = Context(sample=loop, progress=lambda *told: seen.append(told))
    result = Pipeline([LearnLayerCache(evaluations=EVALUATIONS, threshold=0.4, **options)])(program, ctx)
    router = train_layer_router(program, loop, evaluations=EVALUATIONS, threshold=0.4, **options)
    by_hand = Pipeline([router.layer_cache()])(program).plan

    assert result.plan.schedule == by_hand.schedule and set(result.plan.stages) == set(by_hand.stages)
    stats = result.records[0].result.stats
    assert stats["gates"] == 12 and stats["gates_let_go"] == stats["mlp_let_go"] == sum(router.removed().values())
    assert 0 < stats["gates_let_go"] < 12  # it chose
    generators = [torch.Generator().manual_seed(5) for _ in range(3)]
    with torch.no_grad():
        got, want, full = (
            loop(denoise, generator)
            for denoise, generator in zip((result.plan.module(), by_hand.module(), program), generators, strict=True)
        )
    assert torch.equal(got, want)
    assert float((got - full).abs().max()) > 1e-5
    assert sum(1 for what in seen if what[2] == 30) == 30


def test_without_a_sampling_loop_it_says_what_is_missing(program: Program) -> None:
    with pytest.raises(PreconditionError, match=r"give Context\(sample=...\), or `sampling` in a recipe"):
        Pipeline([LearnLayerCache(evaluations=EVALUATIONS)])(program)


def test_a_loop_of_another_length_is_refused(program: Program) -> None:
    with pytest.raises(PreconditionError, match="evaluations"):
        Pipeline([LearnLayerCache(evaluations=EVALUATIONS + 2, rounds=1)])(program, Context(sample=loop))


@pytest.mark.parametrize("options", [{"evaluations": 1}, {"evaluations": 4, "rounds": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="evaluations must be 2 or more"):
        LearnLayerCache(**options)
