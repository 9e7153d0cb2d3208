"""Routers to compare with: as many branches as asked for, in the order that each says."""

from __future__ import annotations

import pytest
import torch
from router_toy import STEPS, captured, sample, taken

import graphwright as gw
from graphwright.passes.router_baselines import (
    bottom_up,
    branch_changes,
    by_change,
    evenly_spread,
    random_router,
    router_errors,
    top_down,
)


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return captured()


@pytest.fixture(scope="module")
def template() -> gw.LayerRouter:
    return gw.LayerRouter(STEPS, (1, 3, 5, 7, 9), ("attention", "mlp") * 4, torch.zeros(5, 8))


def test_the_branches_that_change_least_are_a_baseline(program: gw.Program, template: gw.LayerRouter) -> None:
    changes = branch_changes(program, sample, template, rounds=1)
    assert changes.shape == (5, 8) and bool((changes > 0).all())
    removed = 20
    greedy = by_change(template, changes, removed)
    assert taken(greedy, 0.5) == removed
    dropped = ~greedy.computed()
    assert float(changes[dropped].max()) <= float(changes[~dropped].min())
    by_metric, worst_first, drawn = router_errors(
        program, sample, [greedy, by_change(template, -changes, removed), random_router(template, removed, 0)], rounds=1
    )
    assert by_metric < drawn < worst_first


def test_baselines_take_branches_in_the_order_they_say(template: gw.LayerRouter) -> None:
    assert top_down(template, 12).reuse()[1:10:2] == ((0, 1, 2), (0, 1, 2), (0, 1), (0, 1), (0, 1))
    assert bottom_up(template, 11).reuse()[1:10:2] == ((5, 6, 7), (6, 7), (6, 7), (6, 7), (6, 7))
    assert random_router(template, 12, 0).reuse() == random_router(template, 12, 0).reuse()
    assert random_router(template, 12, 0).reuse() != random_router(template, 12, 1).reuse()
    for removed in (8, 20, 33):
        reused = ~evenly_spread(template, removed).computed()
        assert int(reused.sum()) == removed
        for dim in (0, 1):  # of branches over evaluations, of evaluations over branches
            counts = reused.sum(dim)
            assert int(counts.max() - counts.min()) <= 2
    with pytest.raises(gw.PreconditionError, match="40 branches to reuse, got 41"):
        top_down(template, 41)


def test_routers_of_other_runs_or_models_are_not_compared(program: gw.Program, template: gw.LayerRouter) -> None:
    other = gw.LayerRouter(STEPS, (1, 3, 5, 7, 8), template.kinds, template.logits)
    longer = gw.LayerRouter(STEPS + 1, template.cheap, template.kinds, template.logits)
    fewer = gw.LayerRouter(STEPS, template.cheap, template.kinds[:4], template.logits[:, :4])
    for router, message in (
        (other, "different cheap"),
        (longer, "runs of 11"),
        (fewer, "4 branches, and Transformer has 8"),
    ):
        with pytest.raises(gw.PreconditionError, match=message):
            router_errors(program, sample, [template, router])
