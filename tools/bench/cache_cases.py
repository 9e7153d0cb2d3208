"""Calls that the package DeepCache gets wrong, and what becomes of them here: on a tiny pipeline, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...graph.errors import first_line
from ...graph.schedules import REFRESH, centred
from ..pipelines import CacheHandle, apply_deepcache
from .cache_helper import new_helper, package
from .cache_models import draw, switch_guidance_off, tiny_pipeline
from .cache_rows import Row

Case = Callable[[], tuple[str, str]]
STEPS = 10


def outcome(run: Callable[[], str]) -> str:
    """Return what ``run`` says, or the first line of what it raises: either is the finding."""
    try:
        return run()
    except Exception as err:
        return f"{type(err).__name__}: {first_line(err)}"


@contextmanager
def watched(unet: Any) -> Iterator[list[bool]]:
    """Note for every evaluation inside the block whether its deepest layers ran."""
    full: list[bool] = []

    def deep(*_: Any) -> None:
        full[-1] = True

    deepest = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
    handles = [
        unet.register_forward_pre_hook(lambda *_: full.append(False)),
        deepest.resnets[0].register_forward_pre_hook(deep),
    ]
    try:
        yield full
    finally:
        for handle in handles:
            handle.remove()


def marks(full: list[bool]) -> str:
    """Return ``F--F--`` for full evaluations and reuses."""
    return "".join("F" if was else "-" for was in full)


def ran(handle: CacheHandle) -> str:
    """Return the marks of the last run of ours."""
    return marks([name == REFRESH for name in handle.cached._last.history()])


def both(interval: int, branch: int = 0, draws: Callable[[Any], object] = draw, **options: Any) -> tuple[str, str]:
    """Return the marks, or the error, of the package and of ours.

    Args:
        interval: N.
        branch: The cut.
        draws: Draws with the pipeline.
        options: Of `tiny_pipeline`.
    """

    def theirs() -> str:
        pipe = tiny_pipeline(**options)
        with watched(pipe.unet) as full, package(pipe, interval, branch):
            draws(pipe)
        return marks(full)

    def ours() -> str:
        pipe = tiny_pipeline(**options)
        handle = apply_deepcache(pipe, interval, branch)
        draws(pipe)
        return ran(handle)

    return outcome(theirs), outcome(ours)


def pndm() -> tuple[str, str]:
    """PNDM, 10 steps, N=2: full evaluations at 0, 2, 4, ..."""
    return both(2, scheduler="PNDMScheduler", draws=lambda pipe: _plms(pipe))


def heun(interval: int) -> tuple[str, str]:
    """Heun, 10 steps: times come twice."""
    return both(interval, scheduler="HeunDiscreteScheduler", draws=lambda pipe: draw(pipe, steps=STEPS))


def _plms(pipe: Any) -> Tensor:
    pipe.scheduler.register_to_config(skip_prk_steps=True)
    return draw(pipe, steps=STEPS)


def strengths() -> tuple[str, str]:
    """Pictures from a picture at strength 0.8, then 0.6: the second must be that of a fresh pipeline."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def one(pipe: Any, strength: float) -> Tensor:
        return draw(pipe, image=image, strength=strength, steps=STEPS)

    def fresh() -> Any:
        return tiny_pipeline("StableDiffusionImg2ImgPipeline")

    def theirs() -> str:
        pipe, other = fresh(), fresh()
        with package(pipe, 3, 0):
            one(pipe, 0.8)
            with watched(pipe.unet) as full:
                second = one(pipe, 0.6)
        with package(other, 3, 0):
            want = one(other, 0.6)
        return f"{marks(full)}, off by {float((second - want).abs().max()):.2g}"

    def ours() -> str:
        pipe, other = fresh(), fresh()
        handle = apply_deepcache(pipe)
        one(pipe, 0.8)
        second = one(pipe, 0.6)
        apply_deepcache(other)
        return f"{ran(handle)}, off by {float((second - one(other, 0.6)).abs().max()):.2g}"

    return outcome(theirs), outcome(ours)


def guidance_off() -> tuple[str, str]:
    """Guidance switched off by a callback after step 3: the batch shrinks from 2 to 1."""
    return both(3, draws=lambda pipe: draw(pipe, steps=STEPS, **switch_guidance_off(3)))


def called(**how: Any) -> tuple[str, str]:
    """The denoiser called as somebody's own loop may call it."""

    def calls(pipe: Any) -> None:
        pipe.scheduler.set_timesteps(6)
        sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                time = int(t) if how.get("whole") else t
                args, named = ((sample,), {"timestep": time}) if how.get("named") else ((sample, time), {})
                pipe.unet(*args, **named, encoder_hidden_states=text, return_dict=False)

    return both(3, draws=calls)


def layers(number: int) -> tuple[str, str]:
    """Other numbers of layers in a block: every skip connection must be one cut of its own."""
    branches = 2 * (number + 1)

    def count(pictures: list[Tensor]) -> str:
        distinct = {tuple(picture.flatten().tolist()) for picture in pictures}
        return f"{len(distinct)} distinct cuts for {branches} skip connections"

    def theirs() -> str:
        pictures = []
        for branch in range(branches):
            pipe = tiny_pipeline(layers_per_block=number)
            with package(pipe, 2, branch):
                pictures.append(draw(pipe, steps=4))
        return count(pictures)

    def ours() -> str:
        pictures = []
        for branch in range(branches):
            pipe = tiny_pipeline(layers_per_block=number)
            with apply_deepcache(pipe, 2, branch):
                pictures.append(draw(pipe, steps=4))
        return count(pictures)

    return outcome(theirs), outcome(ours)


def nonuniform() -> tuple[str, str]:
    """The paper's non-uniform schedule, 10 steps, N=2, center 3, power 1.4."""

    def theirs() -> str:
        pipe = tiny_pipeline()
        helper = new_helper(pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0, skip_mode="quad")
        helper.enable()
        with watched(pipe.unet) as full:
            draw(pipe, steps=STEPS)
        return marks(full)

    def ours() -> str:
        pipe = tiny_pipeline()
        handle = apply_deepcache(pipe, schedule=centred(STEPS, 2, 3, 1.4))
        draw(pipe, steps=STEPS)
        return ran(handle)

    return outcome(theirs), outcome(ours)


def twice() -> tuple[str, str]:
    """Enabled a second time, drawn, and disabled."""

    def theirs() -> str:
        pipe = tiny_pipeline()
        helper = new_helper(pipe)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        helper.enable()
        helper.enable()
        with watched(pipe.unet) as full:
            draw(pipe)
        helper.disable()
        return marks(full)

    def ours() -> str:
        pipe = tiny_pipeline()
        handle = apply_deepcache(pipe)
        said = outcome(lambda: str(apply_deepcache(pipe)))
        draw(pipe)
        return f"{said}; the first goes on, {ran(handle)}"

    return outcome(theirs), outcome(ours)


CASES: dict[str, Case] = {
    "PNDM, 10 steps, N=2": pndm,
    "Heun, 10 steps, N=2": lambda: heun(2),
    "Heun, 10 steps, N=3": lambda: heun(3),
    "picture from picture, strength 0.8 then 0.6": strengths,
    "guidance switched off midway": guidance_off,
    "time passed by name": lambda: called(named=True),
    "time passed as an int": lambda: called(whole=True),
    "no middle block": lambda: both(3, mid_block_type=None),
    "1 layer a block": lambda: layers(1),
    "3 layers a block": lambda: layers(3),
    "non-uniform schedule": nonuniform,
    "enabled twice": twice,
}


def rows_of(name: str) -> list[Row]:
    """Return the row of one case: what theirs does, what ours does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what samplers say about their defaults is no finding
        theirs, ours = CASES[name]()
    return [{"case": name, "theirs": theirs, "ours": ours}]
