"""Caches for diffusers pipelines in one line: the pipeline is used as before, and a handle undoes it.

handle = apply_deepcache(pipe, interval=3, branch=0)
image = pipe("a lighthouse", num_inference_steps=50).images[0]
print(handle.summary())
handle.disable()
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..frontends.capture import capture
from ..graph.cost import cost
from ..graph.errors import PreconditionError
from ..graph.plan import Plan
from ..graph.schedules import REFRESH, Listed, Uniform
from ..passes.base import Pass, Pipeline
from ..passes.insert_feature_cache import InsertFeatureCache

# Names that pipelines of diffusers give their denoiser.
DENOISERS = ("unet", "transformer", "prior")


class CachedDenoiser(nn.Module):
    """Stands in for a denoiser: captures it at the first call, inserts the cache, and follows the pipeline's sampler.

    Inputs of another structure, of other sizes besides the batch, on another device, or other weights (adapters that
    were loaded since) are captured anew. What changes neither, such as the scale of an adapter, is not seen: take the
    cache out and put it in again. Everything else that a pipeline asks of it is answered by the denoiser.

    Args:
        denoiser: The pipeline's; never changed.
        step: Makes a plan of the captured program.
        pipe: Whose sampler is followed.
    """

    def __init__(self, denoiser: nn.Module, step: Pass, pipe: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.__dict__.update(_step=step, _pipe=pipe, _plans={}, _weights=None, _last=None, _context="")

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
            plan = Pipeline([self._step])(capture(self.denoiser, args, kwargs)).plan
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
    """What `apply_deepcache` returns: says what the cache does, and takes it out again.

    Also a context manager: leaving it takes the cache out.
    """

    def __init__(self, pipe: Any, component: str, cached: CachedDenoiser) -> None:
        self.pipe, self.component, self.cached = pipe, component, cached

    @property
    def plan(self) -> Plan:
        """The plan of the last call.

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
        macs = {name: cost(stage.program).total_macs for name, stage in plan.stages.items()}
        spent, full = sum(macs[name] for name in ran), macs[REFRESH] * len(ran)
        lines = [f"{plan.name}: {len(ran)} evaluations, {ran.count(REFRESH)} of them full"]
        lines += [f"  {name}: {value / 1e9:.2f} G MACs, {value / macs[REFRESH]:.1%}" for name, value in macs.items()]
        lines += [f"  {note}" for note in plan.notes]
        if spent:
            lines.append(f"  {spent / 1e9:.1f} of {full / 1e9:.1f} G MACs: at most {full / spent:.2f} times as fast")
        return "\n".join(lines)

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
    schedule: Uniform | Listed | None = None,
    cache_interval: int | None = None,
    cache_branch_id: int | None = None,
) -> CacheHandle:
    """Keep the deep features of a pipeline's U-Net over several steps (DeepCache, arXiv 2312.00858).

    Args:
        pipe: A diffusers pipeline, or any object with a denoiser (``unet``) and a ``scheduler`` with ``timesteps``.
        interval: A full evaluation every so many; 1 changes nothing.
        branch: Number of the skip connection, 0 is the shallowest and fastest.
        schedule: Takes the place of ``interval``.
        cache_interval: Another name for ``interval``, that of the package DeepCache.
        cache_branch_id: Another name for ``branch``.

    Raises:
        PreconditionError: The object has no denoiser or no scheduler, or a cache is in place already.
    """
    step = InsertFeatureCache(
        cache_interval or interval, branch if cache_branch_id is None else cache_branch_id, schedule
    )
    return _apply(pipe, step)


def _apply(pipe: Any, step: Pass) -> CacheHandle:
    component = next((name for name in DENOISERS if isinstance(vars(pipe).get(name), nn.Module)), None)
    if component is None or not hasattr(pipe, "scheduler"):
        missing = "no denoiser" if component is None else "no scheduler"
        raise PreconditionError(
            f"{type(pipe).__name__} has {missing}: a pipeline has one of {', '.join(DENOISERS)}, and a scheduler"
        )
    denoiser = vars(pipe)[component]
    if isinstance(denoiser, CachedDenoiser):
        raise PreconditionError(f"{type(pipe).__name__} has a cache already; disable() its handle first")
    cached = CachedDenoiser(denoiser, step, pipe)
    # Not by setattr: a pipeline of diffusers would note another class in its configuration.
    vars(pipe)[component] = cached
    return CacheHandle(pipe, component, cached)


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
