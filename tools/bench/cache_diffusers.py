"""The caches of diffusers, as hooks on a built-in denoiser: which of them take it, and what they give."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..digits import SCHEDULE
from .cache_bed import Bed, Model
from .cache_contenders import Contender

# Applies hooks to a module; `when` returns the time of the present evaluation.
Apply = Callable[[nn.Module, Callable[[], int]], None]
ALWAYS = (-1, 1001)
CALIBRATION_SEED = 1
# Pictures by whose change SeaCache decides for all of a batch.
LOOKED_AT = 64
# What TaylorSeer is given where its own patterns match nothing: attention and feed-forward, or residual blocks.
BRANCHES = (r"transformer_blocks\.\d+\.(attn1|ff)", r".*(attentions|resnets)\.\d+")


class Refused(Exception):
    """A cache does not take the denoiser; the message says why."""


class Hooked:
    """A module with hooks, told before every evaluation where its run is, as pipelines tell it.

    Args:
        bed: The denoiser.
        apply: Applies the hooks to a fresh copy.

    Raises:
        Refused: No layer has a hook after that.
    """

    def __init__(self, bed: Bed, apply: Apply) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self._module, self._time = bed.fresh(), bed.names[1]
        self._now, self._index, self._steps = 0, -1, bed.steps
        self._kept = DDPMScheduler(**SCHEDULE).alphas_cumprod
        apply(self._module, lambda: self._now)
        if not any(is_hooked(module) for name, module in self._module.named_modules() if name):
            raise Refused("raises nothing and hooks no layer: nothing is cached")

    def __call__(self, **inputs: Any) -> Any:
        """Evaluate."""
        from diffusers.models.cache_utils import CacheMixin

        self._now = int(inputs[self._time][0])
        self._index += 1
        signal, noise = self._kept[self._now].sqrt(), (1 - self._kept[self._now]).sqrt()
        # Of the straight path between picture and noise that the hooks think of.
        where = {"step_index": self._index, "num_inference_steps": self._steps, "timestep": self._now}
        owner: Any = self._module
        with CacheMixin.cache_context(owner, "run", sigma=float(noise / (signal + noise)), **where):
            return self._module(**inputs)


def diffusers_hooks() -> Any:
    """Return the module of diffusers that has them; its names are imported at run time, where type checkers do not look."""
    return import_module("diffusers.hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of diffusers."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


def theirs(bed: Bed) -> list[Contender]:
    """Return every cache of diffusers at several settings; making one may refuse."""
    found = {
        "FirstBlockCache": _first_block(),
        "FasterCache": _faster(bed),
        "PyramidAttentionBroadcast": _pyramid(),
        "TaylorSeer": _taylor_seer(),
        "MagCache": _mag(bed),
        "SeaCache": _sea(bed),
    }
    return [
        Contender("diffusers", method, setting, lambda apply=apply: _hooked(bed, apply))
        for method, settings in found.items()
        for setting, apply in settings.items()
    ]


def _hooked(bed: Bed, apply: Apply) -> Model:
    return Hooked(bed, apply)


def _first_block() -> dict[str, Apply]:
    def at(threshold: float) -> Apply:
        def apply(module: nn.Module, when: Callable[[], int]) -> None:
            hooks = diffusers_hooks()
            hooks.apply_first_block_cache(module, hooks.FirstBlockCacheConfig(threshold))

        return apply

    return {f"threshold {t}": at(t) for t in (0.05, 0.1, 0.2, 0.4)}


def _faster(bed: Bed) -> dict[str, Apply]:
    def every(interval: int, window: tuple[int, int], guided: bool) -> Apply:
        def apply(module: nn.Module, when: Callable[[], int]) -> None:
            hooks = diffusers_hooks()
            config = hooks.FasterCacheConfig(
                spatial_attention_block_skip_range=interval,
                spatial_attention_timestep_skip_range=window,
                unconditional_batch_timestep_skip_range=window,
                is_guidance_distilled=not guided,
                tensor_format="BCHW",
                attention_weight_callback=lambda _: 0.5,
                current_timestep_callback=when,
                _unconditional_conditional_input_kwargs_identifiers=list(bed.names),
            )
            hooks.apply_faster_cache(module, config)

        return apply

    # Without guidance there are no two halves of a batch of which one could be predicted from the other.
    settings = {"attention every 2, times below 681": every(2, (-1, 681), False)}
    # It looks into its empty cache if the first evaluation lies in the window.
    later = (-1, 1000 - 1000 // bed.steps)
    settings["attention every 3, all times but the first"] = every(3, later, False)
    if bed.labelled:
        settings["attention every 2, no class every 5, times below 641"] = every(2, (-1, 641), True)
        settings["attention every 3, no class every 5, all times but the first"] = every(3, later, True)
    return settings


def _pyramid() -> dict[str, Apply]:
    def every(interval: int, window: tuple[int, int]) -> Apply:
        def apply(module: nn.Module, when: Callable[[], int]) -> None:
            hooks = diffusers_hooks()
            config = hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=interval,
                spatial_attention_timestep_skip_range=window,
                current_timestep_callback=when,
            )
            hooks.apply_pyramid_attention_broadcast(module, config)

        return apply

    settings = {"every 2, times 100 to 800": every(2, (100, 800))}
    return settings | {f"every {n}, all times": every(n, ALWAYS) for n in (2, 3, 5)}


def _taylor_seer() -> dict[str, Apply]:
    def every(interval: int, order: int, branches: list[str] | None) -> Apply:
        def apply(module: nn.Module, when: Callable[[], int]) -> None:
            hooks = diffusers_hooks()
            config = hooks.TaylorSeerCacheConfig(
                cache_interval=interval,
                max_order=order,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=branches,
            )
            hooks.apply_taylorseer_cache(module, config)

        return apply

    settings = {"its own patterns": every(5, 1, None)}
    given = {f"order {order}, N={n}": every(n, order, list(BRANCHES)) for n in (2, 3, 5) for order in (1, 2)}
    return settings | given


def _mag(bed: Bed) -> dict[str, Apply]:
    ratios = cache(lambda: mag_ratios(bed))

    def at(threshold: float, most: int) -> Apply:
        def apply(module: nn.Module, when: Callable[[], int]) -> None:
            hooks = diffusers_hooks()
            options = {"max_skip_steps": most, "num_inference_steps": bed.steps, "mag_ratios": ratios()}
            hooks.apply_mag_cache(module, hooks.MagCacheConfig(threshold=threshold, **options))

        return apply

    return {f"threshold {t}, at most {most} in a row": at(t, most) for t, most in ((0.06, 3), (0.12, 3), (0.24, 5))}


def mag_ratios(bed: Bed) -> list[float]:
    """Return what MagCache measures in one run of 64 other pictures; it prints them, and gives them in no other way.

    Raises:
        Refused: It hooks no layer.
    """
    hooks = diffusers_hooks()
    config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=bed.steps)
    small = Bed(bed.name, bed.steps, 64)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        small.draw(Hooked(small, lambda module, when: hooks.apply_mag_cache(module, config)), seed=CALIBRATION_SEED)
    return json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[") and "," in line))


def _sea(bed: Bed) -> dict[str, Apply]:
    def at(threshold: float) -> Apply:
        def apply(module: nn.Module, when: Callable[[], int]) -> None:
            hooks = diffusers_hooks()

            def latents(_: nn.Module, args: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
                # A picture is a video of one frame, [channels, 1, height, width]; each is filtered apart.
                return list(inputs[bed.names[0]][-LOOKED_AT:].unsqueeze(2).unbind())

            hooks.apply_sea_cache(module, hooks.SeaCacheConfig(threshold=threshold, raw_vision_callback=latents))

        return apply

    return {f"threshold {t}": at(t) for t in (0.1, 0.25, 0.5)}
