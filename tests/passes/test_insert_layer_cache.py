"""Caches of residual branches against a transformer whose layers give kept results by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.schedules import Uniform, at, masked, step_mask
from graphwright.passes.insert_layer_cache import InsertLayerCache
from graphwright.tools.zoo import ZOO

TIMES = (90, 70, 50, 30, 10)
# Branches in graph order: attention and feed-forward of two blocks.
LAYERS = (
    "transformer_blocks.0.attn1",
    "transformer_blocks.0.ff",
    "transformer_blocks.1.attn1",
    "transformer_blocks.1.ff",
)
REUSE = ((), (0, 3), (), (0, 1, 2, 3), (3, 0))


def first(value: Any) -> Tensor:
    return next(v for v in pytree.tree_leaves(value) if isinstance(v, Tensor))


@pytest.fixture(scope="module")
def dit() -> Any:
    case = ZOO["dit"].build()
    return case, gw.capture(case.model, case.args, case.kwargs, case.dynamic)


def evaluate(denoiser: Any, case: Any, x: Tensor, t: int) -> Tensor:
    inputs = dict(case.kwargs)
    inputs["hidden_states"] = x
    inputs["timestep"] = torch.full_like(inputs["timestep"], t)
    with torch.no_grad():
        return first(denoiser(**inputs))[:, : x.shape[1]]


def sampled(denoiser: Any, case: Any, before: Any = lambda i: None) -> Tensor:
    x = case.kwargs["hidden_states"]
    for i, t in enumerate(TIMES):
        before(i)
        x = x - 0.2 * evaluate(denoiser, case, x, t)
    return x


def by_hand(case: Any, reuse: tuple[tuple[int, ...], ...]) -> Tensor:
    """Sample with hooks that keep the layers' results at full evaluations and give them back at the others."""
    kept: dict[int, Tensor] = {}
    now: list[int] = [0]
    hooks = []

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            pattern = reuse[now[0]]
            if not pattern:
                kept[number] = output
            return kept[number] if number in pattern else output

        return hook

    for number, name in enumerate(LAYERS):
        hooks.append(case.model.get_submodule(name).register_forward_hook(keep(number)))
    try:
        return sampled(case.model, case, lambda i: now.__setitem__(0, i))
    finally:
        for hook in hooks:
            hook.remove()


def test_a_run_with_a_list_equals_the_hooks(dit) -> None:
    case, program = dit
    plan = gw.Pipeline([InsertLayerCache(reuse=REUSE)])(program).plan
    module = plan.module()
    got, want = sampled(module, case), by_hand(case, REUSE)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert module.history() == ("refresh", "reuse_0", "refresh", "reuse_1", "reuse_0")
    assert float((want - sampled(case.model, case)).abs().max()) > 1e-3


def test_registers_may_be_named_in_any_order(dit) -> None:
    case, program = dit
    plan = gw.Pipeline([InsertLayerCache(reuse=REUSE)])(program).plan
    stages = {name: replace(stage, reads=stage.reads[::-1]) for name, stage in plan.stages.items()}
    assert len(stages["reuse_1"].reads) == 4
    assert torch.equal(sampled(replace(plan, stages=stages).module(), case), sampled(plan.module(), case))


def test_kept_results_of_the_same_evaluation_change_nothing(dit) -> None:
    case, program = dit
    plan = gw.Pipeline([InsertLayerCache(reuse=REUSE)])(program).plan
    with torch.no_grad():
        want = first(case.model(*case.args, **case.kwargs))
        out, written = plan.stages["refresh"].program(*case.args, **case.kwargs)
        torch.testing.assert_close(first(out), want, rtol=0, atol=1e-6)
        for name in ("reuse_0", "reuse_1"):
            stage = plan.stages[name]
            again = stage.program(
                *case.args, **case.kwargs, **{register: written[register] for register in stage.reads}
            )
            torch.testing.assert_close(first(again), want, rtol=0, atol=1e-6)


def test_what_is_not_computed_is_gone_and_equal_patterns_are_one_program(dit) -> None:
    _, program = dit
    result = gw.Pipeline([InsertLayerCache(reuse=REUSE)])(program)
    plan, stats = result.plan, result.records[0].result.stats
    assert set(plan.stages) == {"refresh", "reuse_0", "reuse_1"}
    assert stats["macs_reuse_1"] < stats["macs_reuse_0"] < stats["macs_refresh"]
    names = set(plan.stages["reuse_1"].program.parameters())
    assert not any(".attn1." in name or ".ff." in name for name in names)
    assert any("norm1" in name for name in names)  # the gates are those of this evaluation


@pytest.mark.parametrize(("kinds", "taken"), [(("attention",), (0, 2)), (("attention", "mlp"), (0, 1, 2, 3))])
def test_all_of_a_kind_at_an_interval(dit, kinds: tuple[str, ...], taken: tuple[int, ...]) -> None:
    case, program = dit
    plan = gw.Pipeline([InsertLayerCache(interval_steps=2, kinds=kinds)])(program).plan
    got = sampled(plan.module(), case)
    torch.testing.assert_close(got, by_hand(case, ((), taken, (), taken, ())), rtol=0, atol=1e-5)


def test_a_removal_before_the_cache(dit) -> None:
    case, program = dit
    removal = gw.RemoveChannels(ratio=0.5, head_ratio=0.5)
    smaller = gw.Pipeline([removal])(program).output
    result = gw.Pipeline([removal, InsertLayerCache(reuse=REUSE)])(program)
    plan, before = result.plan, sum(t.numel() for t in program.parameters().values())
    assert sum(t.numel() for t in plan.stages["refresh"].program.parameters().values()) < 0.8 * before
    with torch.no_grad():
        want = first(smaller(*case.args, **case.kwargs))
        out, written = plan.stages["refresh"].program(*case.args, **case.kwargs)
        torch.testing.assert_close(first(out), want, rtol=0, atol=1e-6)
        for name in ("reuse_0", "reuse_1"):
            stage = plan.stages[name]
            kept = {register: written[register] for register in stage.reads}
            again = first(stage.program(*case.args, **case.kwargs, **kept))
            torch.testing.assert_close(again, want, rtol=0, atol=1e-6)
            other = first(stage.program(*case.args, **case.kwargs, **{r: v + 1 for r, v in kept.items()}))
            assert float((other - want).abs().max()) > 1e-3
        whole = first(case.model(*case.args, **case.kwargs))
    assert float((want - whole).abs().max()) > 1e-3


ALL = (0, 1, 2, 3)
# What is published as methods of their own: the same programs by other schedules.
SCHEDULES = {
    "FORA, every 2": (Uniform(2), "10101"),
    "FORA, every 3": (Uniform(3), "10010"),
    "step mask, medium": (step_mask(5, "medium"), "10010"),
    "step mask, slow": (step_mask(5, "slow"), "10101"),
    "mask": (masked("11001"), "11001"),
    "places": (at([0, 4], 5), "10001"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_fora_and_step_masks_are_schedules_of_the_same_programs(dit, name: str) -> None:
    case, program = dit
    schedule, full = SCHEDULES[name]
    plan = gw.Pipeline([InsertLayerCache(schedule=schedule)])(program).plan
    module = plan.module()
    got = sampled(module, case)
    assert module.history() == tuple("refresh" if c == "1" else "reuse" for c in full)
    want = by_hand(case, tuple(() if c == "1" else ALL for c in full))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    other = gw.Pipeline([InsertLayerCache(interval_steps=2)])(program).plan
    for stage in ("refresh", "reuse"):
        mine, theirs = (p.stages[stage].program.graph_module.code for p in (plan, other))
        assert mine == theirs


def test_a_list_and_a_schedule_together_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        InsertLayerCache(reuse=REUSE, schedule=Uniform(2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dit", {"reuse": ((), (4,))}, "no branch 4: DiTTransformer2DModel has 4, numbered from 0 to 3"),
        ("dit", {"reuse": ((0,), ())}, "evaluation 0 runs 'reuse_0', which reads the register 'cached_branch_0'"),
        ("dit", {"kinds": ("conv",)}, "no branches of kind 'conv'; known: attention, mlp"),
        ("dit", {"timestep": "t"}, "has no input 't'"),
    ],
)
def test_what_does_not_apply_is_refused(dit, name: str, options: dict[str, Any], message: str) -> None:
    _, program = dit
    with pytest.raises(gw.PreconditionError, match=message):
        gw.Pipeline([InsertLayerCache(**options)])(program)
