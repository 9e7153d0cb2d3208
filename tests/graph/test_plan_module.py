"""The plan module against a hand-written loop, and odd ways of calling it: equal to a fresh run, or a clear error."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphwright as gw
from graphwright.graph.plan import Plan
from graphwright.graph.plan_module import PlanModule
from graphwright.graph.schedules import Listed, Uniform
from graphwright.passes.insert_feature_cache import InsertFeatureCache


class Tiny(nn.Module):
    """A U-Net of one skip connection; `deep` is what a cache keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.up = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 2, 2), nn.Conv2d(6, 5, 1)
        self.leave = nn.Conv2d(9, 2, 1)

    def deep(self, entered: Tensor, timestep: Tensor) -> Tensor:
        h = self.down(entered).relu() * (1 + timestep.float().reshape(-1, 1, 1, 1) / 100)
        return nn.functional.interpolate(self.up(h), scale_factor=2.0)

    def forward(self, x: Tensor, timestep: Tensor, kept: Tensor | None = None) -> Tensor:
        entered = self.enter(x)
        return self.leave(torch.cat([self.deep(entered, timestep) if kept is None else kept, entered], 1))


TIMES = (90, 70, 50, 30, 10)


@pytest.fixture(scope="module")
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def program(model: Tiny) -> gw.Program:
    x = torch.randn(2, 2, 8, 8)
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    return gw.capture(model, (x, torch.tensor(50)), None, dynamic)


def plan_of(program: gw.Program, schedule: Uniform | Listed | None = None) -> Plan:
    return gw.Pipeline([InsertFeatureCache(schedule=schedule or Uniform(2))])(program).plan


def step(x: Tensor, out: Tensor) -> Tensor:
    return x - 0.3 * out


def sampled(denoiser: Any, x: Tensor, times: Any = TIMES) -> Tensor:
    with torch.no_grad():
        for t in times:
            x = step(x, denoiser(x, torch.as_tensor(t)))
    return x


def reference(model: Tiny, x: Tensor, full: list[bool], times: Any = TIMES) -> Tensor:
    """Sample with the feature kept by hand."""
    kept = None
    with torch.no_grad():
        for t, refresh in zip(times, full, strict=True):
            t = torch.as_tensor(t)
            kept = model.deep(model.enter(x), t) if refresh else kept
            x = step(x, model(x, t, kept))
    return x


def noise(seed: int, batch: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, 2, size, size, generator=torch.Generator().manual_seed(seed))


EVEN = [True, False, True, False, True]


def test_a_run_equals_the_loop_by_hand_and_not_the_run_without_cache(program, model) -> None:
    x = noise(1)
    got = sampled(PlanModule(plan_of(program)), x)
    torch.testing.assert_close(got, reference(model, x, EVEN), rtol=1e-6, atol=1e-6)
    assert float((got - sampled(model, x)).abs().max()) > 1e-2


def test_an_interval_of_one_is_bit_identical_to_no_cache(program, model) -> None:
    x = noise(2)
    assert torch.equal(sampled(PlanModule(plan_of(program, Uniform(1))), x), sampled(program, x))


def test_the_stages_that_ran_are_told(program) -> None:
    module = PlanModule(plan_of(program))
    sampled(module, noise(3))
    assert module.history() == ("refresh", "reuse", "refresh", "reuse", "refresh")


def test_a_second_image_does_not_see_the_first(program, model) -> None:
    module = PlanModule(plan_of(program))
    sampled(module, noise(4))
    torch.testing.assert_close(sampled(module, noise(5)), reference(model, noise(5), EVEN), rtol=1e-6, atol=1e-6)


def test_a_run_that_starts_later_and_is_longer_or_shorter(program, model) -> None:
    module = PlanModule(plan_of(program))
    for times in (TIMES[1:], TIMES[3:], TIMES, TIMES[2:]):
        got = sampled(module, noise(6), times)
        want = reference(model, noise(6), EVEN[: len(times)], times)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_runs_of_a_single_evaluation(program, model) -> None:
    module = PlanModule(plan_of(program))
    for seed in range(3):
        assert torch.equal(sampled(module, noise(seed), (50,)), sampled(model, noise(seed), (50,)))


def test_times_that_come_twice_count_as_evaluations(program, model) -> None:
    times = (90, 70, 70, 50, 50, 30)
    module = PlanModule(plan_of(program))
    got = sampled(module, noise(7), times)
    assert module.history() == ("refresh", "reuse") * 3
    torch.testing.assert_close(got, reference(model, noise(7), [True, False] * 3, times), rtol=1e-6, atol=1e-6)


def test_two_evaluations_a_step_stay_together(program) -> None:
    module = PlanModule(plan_of(program, Uniform(2, per_step=2)))
    sampled(module, noise(7), (90, 80, 70, 60, 50, 40))
    assert module.history() == ("refresh", "refresh", "reuse", "reuse", "refresh", "refresh")


def test_ascending_times(program, model) -> None:
    module = PlanModule(plan_of(program), ascending=True)
    times = TIMES[::-1]
    for _ in range(2):
        got = sampled(module, noise(8), times)
        torch.testing.assert_close(got, reference(model, noise(8), EVEN, times), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["batch", "size", "nothing"])
def test_inputs_of_another_shape_make_a_full_evaluation(program, model, change: str) -> None:
    module = PlanModule(plan_of(program))
    first = noise(9, 4)
    second = {"batch": first[:2], "size": noise(9, 4, 12), "nothing": first}[change]
    with torch.no_grad():
        module(first, torch.tensor(90))
        got = module(second, torch.tensor(70))
    if change == "nothing":
        assert module.history() == ("refresh", "reuse")
    else:
        assert module.history() == ("refresh", "refresh")
        torch.testing.assert_close(got, model(second, torch.tensor(70)))


def test_after_an_error_inside_the_next_evaluation_is_a_full_one(program, model, monkeypatch) -> None:
    module = PlanModule(plan_of(program))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with torch.no_grad():
        module(noise(1), torch.tensor(90))
        with pytest.raises(gw.InputError):
            module(noise(1).double(), torch.tensor(70))
        monkeypatch.setattr(module.stages["reuse"], "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            module(noise(1), torch.tensor(70))
        assert module.history() == ()
        torch.testing.assert_close(module(noise(2), torch.tensor(50)), model(noise(2), torch.tensor(50)))


def test_a_register_of_another_dtype_is_refused_by_name(program) -> None:
    module = PlanModule(plan_of(program))
    with torch.no_grad():
        module(noise(1), torch.tensor(90))
        (kept,) = module._runs[""].registers.values()
        kept[0] = (0, kept[0][1].double())
        with pytest.raises(gw.InputError, match=r"input 'cached.*' must have dtype torch.float32, got torch.float64"):
            module(noise(1), torch.tensor(70))


def test_a_register_that_autocast_wrote_is_refused_after_runs_without_it(program) -> None:
    module = PlanModule(plan_of(program))
    sampled(module, noise(1))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            module(noise(1), torch.tensor(90))
        with pytest.raises(gw.InputError, match=r"input 'cached.*' must have dtype torch.float32, got torch.bfloat16"):
            module(noise(1), torch.tensor(70))


def test_a_stage_that_was_changed_is_checked_again(program) -> None:
    plan = plan_of(program)
    module = plan.module()
    sampled(module, noise(1))
    plan.stages["reuse"].program.guards = ("size('x', 0) > 10",)
    with pytest.raises(gw.InputError, match=r"was captured where size\('x', 0\) > 10"):
        sampled(module, noise(1))


class Sampler(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.denoiser = plan.module()

    def forward(self, x: Tensor) -> Tensor:
        self.denoiser.reset()
        for t in TIMES:
            x = step(x, self.denoiser(x, torch.tensor(t)))
        return x


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", ["make_fx", "strict", "not strict"])
def test_a_whole_run_can_be_traced_with_open_sizes(program, model, how: str, before: bool) -> None:
    sampler, x = Sampler(plan_of(program)).requires_grad_(False), noise(1)
    if before:
        sampler(x)
    if how == "make_fx":
        traced = make_fx(sampler, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    else:
        sizes = ({0: torch.export.Dim.DYNAMIC},)
        traced = torch.export.export(sampler, (x,), dynamic_shapes=sizes, strict=how == "strict").module()
    for batch in (3, 5):
        want = reference(model, noise(2, batch), EVEN)
        torch.testing.assert_close(traced(noise(2, batch)), want, rtol=1e-5, atol=1e-5)


def test_hooks_of_stages_are_called(program) -> None:
    module, seen = PlanModule(plan_of(program)), []
    for name, stage in module.stages.items():
        stage.register_forward_hook(lambda *_, name=name: seen.append(name))
    sampled(module, noise(1))
    assert seen == list(module.history())


def test_reset_begins_anew(program, model) -> None:
    module = PlanModule(plan_of(program))
    with torch.no_grad():
        module(noise(1), torch.tensor(90))
        module.reset()
        torch.testing.assert_close(module(noise(2), torch.tensor(70)), model(noise(2), torch.tensor(70)))


def test_conditions_apart_need_contexts_and_are_refused_without(program, model) -> None:
    module = PlanModule(plan_of(program))
    with torch.no_grad(), pytest.raises(gw.InputError, match="called twice at every time"):
        for t in TIMES:
            module(noise(1), torch.tensor(t))
            module(noise(2), torch.tensor(t))

    module.reset()
    a, b = noise(1), noise(2)
    with torch.no_grad():
        for t in TIMES:
            with module.cache_context("cond"):
                a = step(a, module(a, torch.tensor(t)))
            with module.cache_context("uncond"):
                b = step(b, module(b, torch.tensor(t)))
    torch.testing.assert_close(a, reference(model, noise(1), EVEN), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(b, reference(model, noise(2), EVEN), rtol=1e-6, atol=1e-6)


def sampler(times: Any = TIMES) -> SimpleNamespace:
    return SimpleNamespace(timesteps=torch.tensor(times))


def test_with_a_clock_a_stopped_run_is_over_when_the_sampler_makes_a_new_grid(program, model) -> None:
    scheduler = sampler()
    module = PlanModule(plan_of(program), clock=lambda: scheduler.timesteps)
    sampled(module, noise(1), scheduler.timesteps[:3])  # stopped after three of five
    scheduler.timesteps = torch.tensor(TIMES)
    times = scheduler.timesteps[3:]  # a run that starts later than the other stopped
    want = reference(model, noise(2), EVEN[:2], times)
    torch.testing.assert_close(sampled(module, noise(2), times), want, rtol=1e-6, atol=1e-6)
    assert module.history() == ("refresh", "reuse")


def test_with_a_clock_equal_times_and_single_evaluations_are_told_apart(program, model) -> None:
    scheduler = sampler((90, 90, 70, 70))
    module = PlanModule(plan_of(program), clock=lambda: scheduler.timesteps)
    sampled(module, noise(1), scheduler.timesteps)
    assert module.history() == ("refresh", "reuse") * 2
    for _ in range(2):
        scheduler.timesteps = torch.tensor([50])
        sampled(module, noise(1), scheduler.timesteps)
        assert module.history() == ("refresh",)


def test_a_module_that_serves_two_samplers_is_refused(program) -> None:
    mine, other = sampler(), sampler()
    module = PlanModule(plan_of(program), clock=lambda: mine.timesteps)
    with torch.no_grad():
        module(noise(1), mine.timesteps[0])
        with pytest.raises(gw.InputError, match="not at the next time of its pipeline's sampler"):
            module(noise(2), other.timesteps[0])
        with pytest.raises(gw.InputError, match="not at the next time of its pipeline's sampler"):
            module(noise(2), mine.timesteps[0])
        module(noise(1), mine.timesteps[1])
    assert module.history() == ("refresh", "reuse")


def test_times_computed_from_the_grid_are_read(program, model) -> None:
    scheduler = sampler()
    module = PlanModule(plan_of(program), clock=lambda: scheduler.timesteps)
    for seed in (1, 2):
        scheduler.timesteps = torch.tensor(TIMES)
        times = scheduler.timesteps * 1
        want = reference(model, noise(seed), EVEN, times)
        torch.testing.assert_close(sampled(module, noise(seed), times), want, rtol=1e-6, atol=1e-6)


def test_a_list_for_another_number_of_evaluations_is_refused(program) -> None:
    schedule = Listed(("refresh", "reuse", "reuse"))
    module = PlanModule(plan_of(program, schedule))
    with pytest.raises(gw.PreconditionError, match="for runs of 3 evaluations, and this run goes on"):
        sampled(module, noise(1))

    scheduler = sampler()
    module = PlanModule(plan_of(program, schedule), clock=lambda: scheduler.timesteps)
    with pytest.raises(gw.PreconditionError, match="runs of 3 evaluations, and the sampler will make 5"):
        sampled(module, noise(1), scheduler.timesteps)
    sampled(module, noise(1), scheduler.timesteps[2:])
    assert module.history() == ("refresh", "reuse", "reuse")


def test_a_schedule_that_begins_with_a_reuse_is_refused(program) -> None:
    with pytest.raises(gw.PreconditionError, match="evaluation 0 runs 'reuse', which reads the register"):
        plan_of(program, Listed(("reuse", "refresh")))


def test_stages_share_their_parameters_and_the_reuse_stage_has_its_own_alone(program) -> None:
    plan = plan_of(program)
    full, reuse = (plan.stages[name].program.parameters() for name in ("refresh", "reuse"))
    assert set(reuse) == {"enter.weight", "enter.bias", "leave.weight", "leave.bias"}
    assert all(full[name] is parameter for name, parameter in reuse.items())


def test_a_register_is_not_written_over(program) -> None:
    module = PlanModule(plan_of(program, Uniform(5)))
    with torch.no_grad():
        module(noise(1), torch.tensor(90))
        (((_, kept),),) = module._runs[""].registers.values()
        before = kept.clone()
        for t in TIMES[1:]:
            module(noise(t), torch.tensor(t))
    assert torch.equal(kept, before)


@pytest.mark.parametrize("order", [0, 1])
def test_what_an_evaluation_replaces_is_gone_before_it_begins(program, order) -> None:
    module = gw.Pipeline([InsertFeatureCache(interval_steps=2, extrapolation=order)])(program).plan.module()
    written: list[weakref.ref[Tensor]] = []
    alive = []

    def note_written(_: nn.Module, __: Any, result: Any) -> None:
        written.append(weakref.ref(*result[1].values()))

    module.stages["refresh"].register_forward_pre_hook(lambda *_: alive.append(sum(r() is not None for r in written)))
    module.stages["refresh"].register_forward_hook(note_written)
    times = (90, 80, 70, 60, 50, 40)
    sampled(module, noise(1), times)
    assert alive == [0, order, order]
    sampled(module, noise(1), times)  # a new run keeps nothing of the one before
    assert alive[3:] == [0, order, order]
    with torch.no_grad():
        module(noise(1)[:1], torch.tensor(30))  # another shape
    assert alive[6:] == [0] and written[-1]() is not None


# ---------------------------------------------------------------------- extrapolation


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_reuse_reads_the_polynomial_through_the_last_full_evaluations(program, model, order) -> None:
    step = InsertFeatureCache(interval_steps=2, extrapolation=order)
    module = gw.Pipeline([step])(program).plan.module()
    times = (90, 80, 70, 60, 50, 40, 30, 20)
    x, kept, plain = noise(3), [], []
    with torch.no_grad():
        for i, time in enumerate(times):
            got = module(x, torch.tensor(time))
            value = None
            if i % 2 == 0:
                kept.append((float(i), model.deep(model.enter(x), torch.tensor(time))))
            else:
                # Newton's form, from the points that there are.
                points = kept[-1 - order :]
                value = _newton([p for p, _ in points], [v for _, v in points], float(i))
                plain.append(float((value - kept[-1][1]).abs().max()))
            want = model(x, torch.tensor(time), value)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            x = x - 0.05 * want
    assert plain[0] == 0  # one full evaluation before it: nothing to extrapolate from
    assert (max(plain) > 1e-3) is (order > 0)


def _newton(places: list[float], values: list[Tensor], at: float) -> Tensor:
    table = list(values)
    for level in range(1, len(table)):
        for j in range(len(table) - 1, level - 1, -1):
            table[j] = (table[j] - table[j - 1]) / (places[j] - places[j - level])
    result = table[-1]
    for j in range(len(table) - 2, -1, -1):
        result = table[j] + (at - places[j]) * result
    return result


def test_extrapolation_does_not_reach_over_another_size_or_another_run(program, model) -> None:
    module = gw.Pipeline([InsertFeatureCache(interval_steps=2, extrapolation=1)])(program).plan.module()
    with torch.no_grad():
        for time in (90, 80, 70):
            module(noise(1), torch.tensor(time))
        other = noise(1)[:1]
        torch.testing.assert_close(module(other, torch.tensor(60)), model(other, torch.tensor(60)))
        module(other, torch.tensor(50))  # full, by the schedule
        first = module(other, torch.tensor(40))
        assert first.isfinite().all() and first.shape == other.shape
        module(noise(2), torch.tensor(90))  # a new run
        deep = model.deep(model.enter(noise(2)), torch.tensor(90))
        torch.testing.assert_close(module(noise(3), torch.tensor(80)), model(noise(3), torch.tensor(80), deep))


def test_a_negative_order_is_refused(program) -> None:
    with pytest.raises(gw.PreconditionError, match="extrapolation must be 0 or more"):
        gw.Pipeline([InsertFeatureCache(extrapolation=-1)])(program)
