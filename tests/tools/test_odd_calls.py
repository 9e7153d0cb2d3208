"""Odd ways to use a cached pipeline: each gives what a fresh pipeline gives that does the same, or a clear error.

Every pattern is given a pipeline that has drawn before, and a maker of fresh ones. It draws with both and compares, bit for
bit. That the cache was at work is seen in the stages that ran.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.tools.bench.cache_models import TINY_SD, draw, switch_guidance_off, tiny_pipeline

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

# One layer a block, and no attention outside the middle: captured in a moment.
SMALL: dict[str, Any] = TINY_SD | {
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
EVERY = 3

Draws = Callable[[Any], Tensor]
Make = Callable[..., Any]
Pattern = Callable[[Any, Make], None]
PATTERNS: dict[str, Pattern] = {}


def pattern(function: Pattern) -> Pattern:
    PATTERNS[function.__name__.replace("_", " ")] = function
    return function


def cached(pipe: Any) -> Any:
    """Put the cache on; the handle is the pipeline's attribute ``handle``, which is none of its components."""
    vars(pipe)["handle"] = gw.apply_deepcache(pipe, interval=EVERY, cache_dir=GRAPHS[0])
    return pipe


GRAPHS: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def graphs(tmp_path_factory: pytest.TempPathFactory) -> None:
    GRAPHS[:] = [tmp_path_factory.mktemp("graphs")]


def fresh(kind: str = "StableDiffusionPipeline", scheduler: str = "DDIMScheduler") -> Any:
    return cached(tiny_pipeline(kind, scheduler, **SMALL))


def ran(pipe: Any) -> str:
    return "".join("F" if name == "refresh" else "-" for name in pipe.handle.cached._last.history())


def same(used: Any, make: Make, draws: Draws, stages: str | None = None) -> None:
    """Draw with a used pipeline and with a fresh one, and compare."""
    got, new = draws(used), make()
    want = draws(new)
    assert want.isfinite().all() and float(want.abs().max()) > 0.1
    assert torch.equal(got, want)
    if stages is not None:
        assert ran(used) == ran(new) == stages


def at_step(step: int, act: Callable[[Any], object]) -> dict[str, Any]:
    """Return an option of `draw` that acts after a step."""

    def callback(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            act(pipe)
        return values

    return {"callback_on_step_end": callback}


class Stop(Exception):
    pass


def stop(pipe: Any) -> None:
    raise Stop


# ---------------------------------------------------------------------- runs one after the other


@pattern
def two_images_in_a_row(pipe: Any, make: Make) -> None:
    draw(pipe, seed=1)
    same(pipe, make, lambda p: draw(p, seed=2), "F--F--")


@pattern
def the_same_image_twice(pipe: Any, make: Make) -> None:
    first = draw(pipe, seed=1)
    assert torch.equal(draw(pipe, seed=1), first)
    same(pipe, make, lambda p: draw(p, seed=1), "F--F--")


@pattern
def more_steps_then_fewer(pipe: Any, make: Make) -> None:
    for steps, stages in ((8, "F--F--F-"), (2, "F-"), (1, "F"), (5, "F--F-")):
        same(pipe, make, lambda p, steps=steps: draw(p, steps=steps), stages)


@pattern
def an_image_from_an_image_at_other_strengths(pipe: Any, make: Make) -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    kind = "StableDiffusionImg2ImgPipeline"
    used = fresh(kind)
    for strength, stages in ((0.8, "F--F--F-"), (0.6, "F--F--"), (0.1, "F")):
        same(used, lambda: fresh(kind), partial(draw, steps=10, image=image, strength=strength), stages)


@pattern
def a_larger_batch_then_a_smaller_one(pipe: Any, make: Make) -> None:
    for count in (3, 1, 2):
        same(pipe, make, lambda p, count=count: draw(p, num_images_per_prompt=count), "F--F--")


@pattern
def another_resolution_and_back(pipe: Any, make: Make) -> None:
    def sized(p: Any, side: int) -> Tensor:
        text = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(5))
        return p(
            prompt_embeds=text,
            negative_prompt_embeds=-text,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(6),
            output_type="latent",
            height=side,
            width=16,
        ).images

    for side in (32, 16, 32):
        same(pipe, make, lambda p, side=side: sized(p, side), "F--F")


@pattern
def without_guidance_then_with(pipe: Any, make: Make) -> None:
    for scale in (1.0, 7.5, 1.0):
        same(pipe, make, lambda p, scale=scale: draw(p, guidance_scale=scale), "F--F--")


@pattern
def another_scheduler_in_the_same_pipeline(pipe: Any, make: Make) -> None:
    def exchanged(p: Any, name: str) -> Tensor:
        p.scheduler = getattr(import_module("diffusers"), name).from_config(p.scheduler.config)
        return draw(p)

    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"):
        same(pipe, make, lambda p, name=name: exchanged(p, name), "F--F--")


@pattern
def a_scheduler_that_repeats_times(pipe: Any, make: Make) -> None:
    def heun(p: Any) -> Tensor:
        p.scheduler = import_module("diffusers").HeunDiscreteScheduler.from_config(p.scheduler.config)
        return draw(p, steps=4)

    same(pipe, make, heun, "F--F--F")


@pattern
def inference_mode_around_one_run_only(pipe: Any, make: Make) -> None:
    with torch.inference_mode():
        draw(pipe, seed=1)
    same(pipe, make, lambda p: draw(p, seed=2), "F--F--")


@pattern
def a_reset_by_hand_between_runs(pipe: Any, make: Make) -> None:
    pipe.handle.cached.reset()
    same(pipe, make, lambda p: draw(p, seed=2), "F--F--")


# ---------------------------------------------------------------------- in the middle of a run


@pattern
def guidance_switched_off_midway(pipe: Any, make: Make) -> None:
    same(pipe, make, lambda p: draw(p, **switch_guidance_off(3)), "F--FF-")
    same(pipe, make, draw, "F--F--")


@pattern
def an_exception_in_the_middle_of_a_run(pipe: Any, make: Make) -> None:
    for step in (0, 1, 3):
        with pytest.raises(Stop):
            draw(pipe, seed=1, **at_step(step, stop))
        same(pipe, make, lambda p: draw(p, seed=2), "F--F--")


@pattern
def an_exception_inside_the_denoiser(pipe: Any, make: Make) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    stages = pipe.handle.cached._last.stages
    whole = stages["reuse"].forward
    stages["reuse"].forward = broken
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe, seed=1)
    stages["reuse"].forward = whole
    same(pipe, make, lambda p: draw(p, seed=2), "F--F--")


@pattern
def a_run_that_the_pipeline_interrupts(pipe: Any, make: Make) -> None:
    def interrupt(p: Any) -> None:
        p._interrupt = True

    draw(pipe, seed=1, **at_step(1, interrupt))
    same(pipe, make, lambda p: draw(p, seed=2), "F--F--")


@pattern
def the_cache_taken_out_midway(pipe: Any, make: Make) -> None:
    same(pipe, make, lambda p: draw(p, **at_step(1, lambda p: p.handle.disable())))
    plain = draw(tiny_pipeline(**SMALL))
    assert torch.equal(draw(pipe), plain)


@pattern
def the_cache_put_in_midway(pipe: Any, make: Make) -> None:
    pipe.handle.disable()
    same(pipe, partial(tiny_pipeline, **SMALL), lambda p: draw(p, **at_step(1, cached)), "F--F")
    same(pipe, make, draw, "F--F--")


@pattern
def the_denoiser_called_by_hand_in_the_middle_of_a_run(pipe: Any, make: Make) -> None:
    def call(p: Any) -> None:
        sample = torch.zeros(2, 4, 8, 8)
        with pytest.raises(gw.InputError, match="not at the next time of its pipeline's sampler"):
            p.unet(sample, torch.tensor(3), encoder_hidden_states=torch.zeros(2, 5, 12), **REST)

    got, want = draw(pipe, seed=2, **at_step(1, call)), draw(make(), seed=2)
    assert torch.equal(got, want)


# What a pipeline passes beside sample, time and text.
REST: dict[str, Any] = {
    "timestep_cond": None,
    "cross_attention_kwargs": None,
    "added_cond_kwargs": None,
    "return_dict": False,
}


@pattern
def the_same_pipeline_called_inside_its_own_callback(pipe: Any, make: Make) -> None:
    with pytest.raises(gw.InputError, match=r"not at the next time of its pipeline's sampler.*reset\(\) begins anew"):
        draw(pipe, seed=1, **at_step(1, lambda p: draw(p, seed=3)))
    same(pipe, make, lambda p: draw(p, seed=2), "F--F--")


# ---------------------------------------------------------------------- several pipelines, one denoiser


def partner(pipe: Any, cache: bool = True) -> Any:
    """Return another pipeline with the same denoiser."""
    other = tiny_pipeline(**SMALL)
    other.unet = pipe.unet.denoiser
    return cached(other) if cache else other


@pattern
def two_cached_pipelines_share_a_denoiser(pipe: Any, make: Make) -> None:
    other = partner(pipe)
    for seed in (1, 2):
        for used in (pipe, other):
            same(used, make, lambda p, seed=seed: draw(p, seed=seed), "F--F--")


@pattern
def a_pipeline_with_a_shared_denoiser_runs_inside_the_other(pipe: Any, make: Make) -> None:
    other, inner = partner(pipe), list[Tensor]()
    got = draw(pipe, seed=1, **at_step(1, lambda _: inner.append(draw(other, seed=3))))
    assert torch.equal(got, draw(make(), seed=1)) and torch.equal(inner[0], draw(make(), seed=3))
    assert ran(pipe) == ran(other) == "F--F--"


@pattern
def a_pipeline_without_a_cache_shares_the_denoiser(pipe: Any, make: Make) -> None:
    plain = partner(pipe, cache=False)
    want = draw(tiny_pipeline(**SMALL), seed=1)
    assert torch.equal(draw(plain, seed=1), want)
    same(pipe, make, lambda p: draw(p, seed=2), "F--F--")
    assert torch.equal(draw(plain, seed=1), want)


@pattern
def a_pipeline_made_of_the_components_of_a_cached_one(pipe: Any, make: Make) -> None:
    """It holds the stand-in, which follows the sampler of the first: refused unless it is that one's."""
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    same(other, make, lambda p: draw(p, seed=2))
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with pytest.raises(gw.InputError, match="not at the next time of its pipeline's sampler"):
        draw(other, seed=2)


# ---------------------------------------------------------------------- weights


@pattern
def weights_changed_in_place(pipe: Any, make: Make) -> None:
    def changed(p: Any) -> Tensor:
        with torch.no_grad():
            p.unet.conv_out.bias.add_(1)
        return draw(p)

    before = draw(pipe)
    same(pipe, make, changed, "F--F--")
    assert not torch.equal(draw(pipe), before)


@pattern
def weights_exchanged(pipe: Any, make: Make) -> None:
    def exchanged(p: Any) -> Tensor:
        p.unet.denoiser.conv_out.bias = torch.nn.Parameter(torch.ones(4))
        return draw(p)

    before = draw(pipe)
    same(pipe, make, exchanged, "F--F--")
    assert not torch.equal(draw(pipe), before)


@pattern
def another_dtype_and_back(pipe: Any, make: Make) -> None:
    def half(p: Any) -> Tensor:
        p.to(torch.float64)
        text = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        options = {"num_inference_steps": 4, "output_type": "latent", "height": 16, "width": 16}
        generator = torch.Generator().manual_seed(6)
        out = p(prompt_embeds=text, negative_prompt_embeds=-text, generator=generator, **options).images
        assert out.dtype is torch.float64
        p.to(torch.float32)
        return out

    same(pipe, make, half, "F--F")
    same(pipe, make, draw, "F--F--")


@pattern
def a_deep_copy_of_the_pipeline(pipe: Any, make: Make) -> None:
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    same(other, make, lambda p: draw(p, seed=2))
    other.handle.disable()
    assert torch.equal(draw(other, seed=2), draw(tiny_pipeline(**SMALL), seed=2))


def test_there_are_more_than_twenty() -> None:
    assert len(PATTERNS) > 20


@pytest.mark.parametrize("name", PATTERNS)
def test_equal_to_a_fresh_run_or_a_clear_error(name: str) -> None:
    pipe = fresh()
    draw(pipe, seed=9)
    assert ran(pipe) == "F--F--"
    PATTERNS[name](pipe, fresh)
