"""Caches for diffusers pipelines in one line: the pipeline is used as before, and a handle undoes it.

handle = apply_deepcache(pipe, interval=3, branch=0)
image = pipe("a lighthouse", num_inference_steps=50).images[0]
print(handle.summary())
handle.export_onnx("out/")  # the plan of that call
handle.disable()

apply_plan(pipe, "out/")  # the pipeline runs on ONNX Runtime now
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..frontends.cache import capture_cached
from ..frontends.capture import capture
from ..graph.document_files import PLAN_FORM
from ..graph.errors import PreconditionError
from ..graph.plan import Plan, Staged
from ..graph.schedules import Listed, Uniform
from ..graph.serialize import load_plan
from ..passes.base import Pass, Pipeline
from ..passes.insert_feature_cache import InsertFeatureCache
from ..passes.insert_layer_cache import KINDS, InsertLayerCache
from .cached_denoiser import CachedDenoiser, CacheHandle, MakePlan

# Names that pipelines of diffusers give their denoiser.
DENOISERS = ("unet", "transformer", "prior")


def apply_deepcache(
    pipe: Any,
    interval: int = 3,
    branch: int = 0,
    *,
    reuse_ratio: float | None = None,
    extrapolation: int = 0,
    schedule: Uniform | Listed | None = None,
    cache_interval: int | None = None,
    cache_branch_id: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> CacheHandle:
    """Keep the deep features of a pipeline's U-Net over several steps (DeepCache, arXiv 2312.00858).

    Args:
        pipe: A diffusers pipeline, or any object with a denoiser (``unet``) and a ``scheduler`` with ``timesteps``.
        interval: A full evaluation every so many; 1 changes nothing.
        branch: Number of the skip connection, 0 is the shallowest and fastest.
        reuse_ratio: Takes the place of ``branch``: the deepest branch whose reuse costs at most this fraction.
        extrapolation: Order of the polynomial through the last kept features that is reused; 0 reuses the last feature.
        schedule: Takes the place of ``interval``.
        cache_interval: Another name for ``interval``, that of the package DeepCache.
        cache_branch_id: Another name for ``branch``.
        cache_dir: Where captured graphs are kept, so that the next process does not capture again; None keeps none.

    Raises:
        PreconditionError: The object has no denoiser or no scheduler, or a cache is in place already.
    """
    step = InsertFeatureCache(
        cache_interval or interval,
        branch if cache_branch_id is None else cache_branch_id,
        schedule,
        reuse_ratio,
        extrapolation=extrapolation,
    )
    return _apply_pass(pipe, step, cache_dir)


def apply_layer_cache(
    pipe: Any,
    interval: int = 2,
    *,
    kinds: tuple[str, ...] = KINDS,
    reuse: Sequence[Sequence[int]] = (),
    extrapolation: int = 0,
    schedule: Uniform | Listed | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> CacheHandle:
    """Take attention and feed-forward branches of a pipeline's transformer from the last full evaluation.

    With ``interval`` all branches of the given kinds are taken, as in FORA (arXiv 2407.01425); with ``reuse`` those that
    it lists for each evaluation, as a router learns them (Learning-to-Cache, arXiv 2406.01733).

    Args:
        pipe: A diffusers pipeline, or any object with a denoiser and a ``scheduler`` with ``timesteps``.
        interval: A full evaluation every so many; 1 changes nothing.
        kinds: ``attention``, ``mlp`` or both.
        reuse: For each evaluation of a run the numbers of the branches to take, such as ``router.reuse(0.1)``. The
            sampler must make as many evaluations.
        extrapolation: Order of the polynomial through the last kept values that is reused; 0 reuses the last value.
        schedule: Takes the place of ``interval``, such as ``step_mask(50, "fast")``; not with ``reuse``.
        cache_dir: Where captured graphs are kept, so that the next process does not capture again; None keeps none.

    Raises:
        PreconditionError: The object has no denoiser or no scheduler, or a cache is in place already.
    """
    listed = tuple(tuple(numbers) for numbers in reuse)
    step = InsertLayerCache(listed, interval, tuple(kinds), extrapolation=extrapolation, schedule=schedule)
    return _apply_pass(pipe, step, cache_dir)


def apply_plan(
    pipe: Any, plan: Staged[Any] | str | os.PathLike[str], *, providers: Sequence[str] | None = None
) -> CacheHandle:
    """Let a pipeline's denoiser be a plan.

    Args:
        pipe: A diffusers pipeline, or any object with a denoiser and a ``scheduler`` with ``timesteps``.
        plan: A plan, or the directory of one that was saved or exported to ONNX. It must have been captured with inputs
            as the pipeline gives them; `CacheHandle.export_onnx` exports one that was.
        providers: Execution providers of ONNX Runtime; None takes the best that work.

    Raises:
        PreconditionError: The object has no denoiser or no scheduler, or a cache is in place already.
        ArtifactError: The directory holds no plan.
    """
    staged = plan if isinstance(plan, Staged) else _load_plan(Path(plan), providers)
    return _apply(pipe, lambda denoiser, args, kwargs: staged)


def _load_plan(folder: Path, providers: Sequence[str] | None) -> Staged[Any]:
    if (folder / PLAN_FORM.file).is_file():
        return load_plan(folder)
    from ..backends.onnx_export import load_onnx_plan

    return load_onnx_plan(folder, providers)


def _apply_pass(pipe: Any, step: Pass, cache_dir: str | os.PathLike[str] | None) -> CacheHandle:
    def make(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        if cache_dir is None:
            return Pipeline([step])(capture(denoiser, args, kwargs)).plan
        return Pipeline([step])(capture_cached(denoiser, args, kwargs, None, cache_dir)).plan

    return _apply(pipe, make)


def _apply(pipe: Any, make: MakePlan) -> CacheHandle:
    component, denoiser = _denoiser(pipe)
    cached = CachedDenoiser(denoiser, make, pipe)
    # Not by setattr: a pipeline of diffusers would note another class in its configuration.
    vars(pipe)[component] = cached
    return CacheHandle(pipe, component, cached)


def _denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """Return name and module of a pipeline's denoiser.

    Raises:
        PreconditionError: It has none, no scheduler, or a cache in its place.
    """
    component = next((name for name in DENOISERS if isinstance(vars(pipe).get(name), nn.Module)), None)
    if component is None or not hasattr(pipe, "scheduler"):
        missing = "no denoiser" if component is None else "no scheduler"
        raise PreconditionError(
            f"{type(pipe).__name__} has {missing}: a pipeline has one of {', '.join(DENOISERS)}, and a scheduler"
        )
    denoiser = vars(pipe)[component]
    if isinstance(denoiser, CachedDenoiser):
        raise PreconditionError(f"{type(pipe).__name__} has a cache already; disable() its handle first")
    return component, denoiser
