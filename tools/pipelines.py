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
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..frontends.capture import capture
from ..graph.cost import cost
from ..graph.document_files import PLAN_FORM
from ..graph.errors import PreconditionError
from ..graph.plan import Plan, Staged
from ..graph.schedules import REFRESH, Listed, Uniform
from ..graph.serialize import load_plan
from ..passes.base import Pass, Pipeline
from ..passes.insert_feature_cache import InsertFeatureCache
from ..passes.insert_layer_cache import KINDS, InsertLayerCache

if TYPE_CHECKING:
    from ..backends.onnx_export import OnnxArtifact

MakePlan = Callable[[tuple[Any, ...], dict[str, Any]], Staged[Any]]

# Names that pipelines of diffusers give their denoiser.
DENOISERS = ("unet", "transformer", "prior")


class CachedDenoiser(nn.Module):
    """Stands in for a denoiser: makes a plan at the first call, and follows the pipeline's sampler.

    For inputs of another structure, of other sizes besides the batch, on another device, or other weights (adapters that
    were loaded since) a plan is made anew. What changes neither, such as the scale of an adapter, is not seen: take the
    cache out and put it in again. Everything else that a pipeline asks of it is answered by the denoiser.

    Args:
        denoiser: The pipeline's; never changed.
        make: Makes the plan from the inputs of a call.
        pipe: Whose sampler is followed.
    """

    def __init__(self, denoiser: nn.Module, make: MakePlan, pipe: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.__dict__.update(_make=make, _pipe=pipe, _plans={}, _weights=None, _last=None, _context="")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.denoiser, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate like the denoiser.

        Raises:
            CaptureError: The denoiser cannot be captured at these inputs.
            PreconditionError: The cache does not apply to it.
        """
        weights = [id(p) for p in self.denoiser.parameters()]
        if weights != self._weights:
            self._plans.clear()
            self.__dict__["_weights"] = weights
        key = _structure(args, kwargs)
        if key not in self._plans:
            plan = self._make(args, kwargs)
            self._plans[key] = plan.module(clock=lambda: self._pipe.scheduler.timesteps)
        module = self._plans[key]
        if self._last is not None and self._last is not module:
            self._last.reset()
        self.__dict__["_last"] = module
        with module.cache_context(self._context):
            return module(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Let the evaluations inside be a run of their own; pipelines that evaluate conditions apart call this."""
        before = self._context
        self.__dict__["_context"] = name
        try:
            yield
        finally:
            self.__dict__["_context"] = before

    def reset(self) -> None:
        """Forget what is kept; the next evaluation is a full one."""
        for module in self._plans.values():
            module.reset()


class CacheHandle:
    """What `apply_deepcache` and the others return: says what the cache does, and takes it out again.

    Also a context manager: leaving it takes the cache out.
    """

    def __init__(self, pipe: Any, component: str, cached: CachedDenoiser) -> None:
        self.pipe, self.component, self.cached = pipe, component, cached

    @property
    def plan(self) -> Staged[Any]:
        """The plan of the last call: a `Plan`, unless the pipeline runs on an exported one.

        Raises:
            PreconditionError: The pipeline has not been called yet: the denoiser is captured at its first call.
        """
        if self.cached._last is None:
            raise PreconditionError("there is no plan yet: the denoiser is captured when the pipeline is first called")
        return self.cached._last.plan

    def summary(self) -> str:
        """Return what ran in the last run, what it cost, and the speed-up that the multiply-accumulates bound."""
        plan = self.plan
        ran = self.cached._last.history()
        lines = [f"{plan.name}: {len(ran)} evaluations, {ran.count(REFRESH)} of them full"]
        if isinstance(plan, Plan):
            macs = {name: cost(stage.program).total_macs for name, stage in plan.stages.items()}
            spent, full = sum(macs[name] for name in ran), macs[REFRESH] * len(ran)
            lines += [
                f"  {name}: {value / 1e9:.2f} G MACs, {value / macs[REFRESH]:.1%}" for name, value in macs.items()
            ]
            if spent:
                lines.append(
                    f"  {spent / 1e9:.1f} of {full / 1e9:.1f} G MACs: at most {full / spent:.2f} times as fast"
                )
        return "\n".join([*lines, *(f"  {note}" for note in plan.notes)])

    def export_onnx(self, directory: str | os.PathLike[str], **options: Any) -> OnnxArtifact:
        """Export the plan of the last call; see `graphwright.export_onnx` for the options.

        Raises:
            PreconditionError: The pipeline has not been called yet, or runs on an export already.
            ExportError: The plan cannot be exported.
        """
        from ..backends.onnx_export import export_onnx

        plan = self.plan
        if not isinstance(plan, Plan):
            raise PreconditionError(f"{plan.name} runs on an exported plan already; its directory is the export")
        return export_onnx(plan, directory, **options)

    def disable(self) -> None:
        """Give the pipeline its denoiser back. Nothing else of it was changed."""
        if vars(self.pipe).get(self.component) is self.cached:
            vars(self.pipe)[self.component] = self.cached.denoiser

    def __enter__(self) -> CacheHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


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
    return _apply_pass(pipe, step)


def apply_layer_cache(
    pipe: Any,
    interval: int = 2,
    *,
    kinds: tuple[str, ...] = KINDS,
    reuse: Sequence[Sequence[int]] = (),
    extrapolation: int = 0,
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

    Raises:
        PreconditionError: The object has no denoiser or no scheduler, or a cache is in place already.
    """
    listed = tuple(tuple(numbers) for numbers in reuse)
    return _apply_pass(pipe, InsertLayerCache(listed, interval, tuple(kinds), extrapolation=extrapolation))


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
    return _apply(pipe, lambda args, kwargs: staged)


def _load_plan(folder: Path, providers: Sequence[str] | None) -> Staged[Any]:
    if (folder / PLAN_FORM.file).is_file():
        return load_plan(folder)
    from ..backends.onnx_export import load_onnx_plan

    return load_onnx_plan(folder, providers)


def _apply_pass(pipe: Any, step: Pass) -> CacheHandle:
    denoiser = _denoiser(pipe)[1]
    return _apply(pipe, lambda args, kwargs: Pipeline([step])(capture(denoiser, args, kwargs)).plan)


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


def _structure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Return what a capture is valid for; the batch is free."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batch = next((v.shape[0] for v in leaves if isinstance(v, Tensor) and v.dim()), None)

    def of(value: Any) -> Hashable:
        if not isinstance(value, Tensor):
            return value if isinstance(value, Hashable) else repr(value)
        shape = ["batch" if d == 0 and size == batch else size for d, size in enumerate(value.shape)]
        return (*shape, value.dtype, value.device)

    return str(spec), tuple(map(of, leaves))
