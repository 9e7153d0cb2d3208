"""Feature caches: both programs against the model itself, at every branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import graphwright as gw
from graphwright.graph.cost import cost
from graphwright.graph.joins import skip_joins
from graphwright.graph.schedules import masked
from graphwright.passes.cache_cuts import live_macs
from graphwright.passes.insert_feature_cache import REGISTER, InsertFeatureCache
from graphwright.tools.zoo import ZOO


@pytest.fixture(scope="module", params=["unet2d", "unet_sd15"])
def unet(request) -> Any:
    case = ZOO[request.param].build()
    return case, gw.capture(case.model, case.args, case.kwargs, case.dynamic)


def first(value: Any) -> Tensor:
    return next(v for v in pytree.tree_leaves(value) if isinstance(v, Tensor))


def test_both_programs_equal_the_model_at_every_branch(unet) -> None:
    case, program = unet
    with torch.no_grad():
        want = first(case.model(*case.args, **case.kwargs))
        assert float(want.abs().max()) > 0.1
        macs, full_macs = [], cost(program).total_macs
        for branch in range(len(skip_joins(program))):
            result = gw.Pipeline([InsertFeatureCache(branch=branch)])(program)
            refresh, reuse = (result.plan.stages[name] for name in ("refresh", "reuse"))
            out, written = refresh.program(*case.args, **case.kwargs)
            torch.testing.assert_close(first(out), want, rtol=0, atol=1e-6)
            again = reuse.program(*case.args, **case.kwargs, **written)
            torch.testing.assert_close(first(again), want, rtol=0, atol=1e-6)
            other = reuse.program(*case.args, **case.kwargs, **{REGISTER: written[REGISTER] + 1})
            assert float((first(other) - want).abs().max()) > 1e-4  # it reads what is kept
            assert list(written) == [REGISTER] and reuse.reads == (REGISTER,)
            full, own = set(refresh.program.parameters()), set(reuse.program.parameters())
            assert own < full
            macs.append(result.records[0].result.stats["macs_reuse"])
    assert macs == sorted(macs) and macs[-1] < full_macs


def test_a_ratio_chooses_the_deepest_branch_that_meets_it(unet) -> None:
    _, program = unet
    joins, full = skip_joins(program), cost(program).total_macs
    ratios = []
    for join in joins:
        result = gw.Pipeline([InsertFeatureCache(branch=join.branch)])(program)
        ratios.append(result.records[0].result.stats["macs_reuse"] / full)
        assert live_macs(program, {join.cut}) == result.records[0].result.stats["macs_reuse"]
    for wanted in (ratios[0], (ratios[1] + ratios[2]) / 2, 1.0):
        stats = gw.Pipeline([InsertFeatureCache(reuse_ratio=wanted)])(program).records[0].result.stats
        assert stats["branch"] == max(i for i, ratio in enumerate(ratios) if ratio <= wanted)
    with pytest.raises(gw.PreconditionError, match=r"no branch of .* costs at most 0\.1% .* the cheapest, 0, costs"):
        gw.Pipeline([InsertFeatureCache(reuse_ratio=0.001)])(program)


def test_what_is_dead_is_gone_in_spite_of_dropout(unet) -> None:
    _, program = unet
    stats = gw.Pipeline([InsertFeatureCache(branch=0)])(program).records[0].result.stats
    assert stats["nodes_reuse"] < 0.3 * stats["nodes_refresh"]


def test_another_batch_and_a_removal_before() -> None:
    case = ZOO["unet2d"].build()
    program = gw.capture(case.model, case.args, case.kwargs, case.dynamic)
    result = gw.Pipeline([gw.RemoveChannels(ratio=0.25, criterion="random"), InsertFeatureCache(branch=1)])(program)
    smaller = gw.Pipeline([gw.RemoveChannels(ratio=0.25, criterion="random")])(program).program
    inputs = {k: torch.cat([v, v.flip(0)]) if isinstance(v, Tensor) and v.dim() else v for k, v in case.kwargs.items()}
    with torch.no_grad():
        want = first(smaller(*case.args, **inputs))
        out, written = result.plan.stages["refresh"].program(*case.args, **inputs)
        again = result.plan.stages["reuse"].program(*case.args, **inputs, **written)
    assert (
        result.plan.stages["refresh"].program.parameters()["conv_in.weight"].numel()
        < program.parameters()["conv_in.weight"].numel()
    )
    torch.testing.assert_close(first(out), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(first(again), want, rtol=0, atol=1e-6)


def test_clean_up_runs_on_every_program_of_a_plan_and_a_removal_does_not() -> None:
    case = ZOO["unet2d"].build()
    program = gw.capture(case.model, case.args, case.kwargs, case.dynamic)
    result = gw.Pipeline([InsertFeatureCache(schedule=masked("10")), gw.RemoveDropout(), gw.EliminateDeadCode()])(
        program
    )
    assert not any(
        "dropout" in str(node.target) for stage in result.plan.stages.values() for node in stage.program.nodes
    )
    with pytest.raises(gw.PreconditionError, match="remove-channels rewrites one program.*put it before"):
        gw.Pipeline([InsertFeatureCache(), gw.RemoveChannels(ratio=0.5)])(program)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet2d", {"branch": 6}, "has 6 skip connections, numbered from 0 .the shallowest. to 5"),
        ("unet2d", {"branch": -1}, "no branch -1"),
        ("dit", {}, "needs a network with skip connections .* insert-layer-cache"),
        ("unet2d", {"timestep": "t"}, "has no input 't'; its inputs are sample, timestep"),
    ],
)
def test_what_does_not_apply_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    case = ZOO[name].build()
    program = gw.capture(case.model, case.args, case.kwargs, case.dynamic)
    with pytest.raises(gw.PreconditionError, match=message):
        InsertFeatureCache(**options)(program)
