"""What stands in the place of a pipeline's denoiser while a cache is in use, and the handle that takes it out again."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..graph.errors import PreconditionError
from ..graph.plan import Plan, Staged
from ..graph.schedules import REFRESH, speedup_bound

if TYPE_CHECKING:
    from ..backends.onnx_export import OnnxArtifact

MakePlan = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Staged[Any]]


class CachedDenoiser(nn.Module):
    """Stands in for a denoiser: makes a plan at the first call, and follows the pipeline's sampler.

    For inputs of another structure, of other sizes besides the batch, on another device, or other weights (adapters that
    were loaded since) a plan is made anew. What changes neither, such as the scale of an adapter, is not seen: take the
    cache out and put it in again. Everything else that a pipeline asks of it is answered by the denoiser.

    Args:
        denoiser: The pipeline's; never changed.
        make: Makes the plan from the denoiser and the inputs of a call.
        pipe: Whose sampler is followed.
    """

    def __init__(self, denoiser: nn.Module, make: MakePlan, pipe: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.__dict__.update(_make=make, _pipe=pipe, _plans={}, _weights=None, _last=None, _context="")

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedDenoiser:
        """Return what stands in for a copy of the denoiser in a copy of the pipeline; it makes its own plans."""
        other = CachedDenoiser.__new__(CachedDenoiser)
        memo[id(self)] = other  # before the pipeline is copied, which holds this module
        other.__init__(copy.deepcopy(self.denoiser, memo), self._make, None)
        other.__dict__["_pipe"] = copy.deepcopy(self._pipe, memo)
        return other

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
            plan = self._make(self.denoiser, args, kwargs)
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
        return self._module().plan

    def _module(self) -> Any:
        if self.cached._last is None:
            raise PreconditionError("there is no plan yet: the denoiser is captured when the pipeline is first called")
        return self.cached._last

    def history(self) -> tuple[str, ...]:
        """Return the stages that ran in the last run, those of one `cache_context` after those of another.

        Raises:
            PreconditionError: See `plan`.
        """
        module = self._module()
        return tuple(stage for context in module.contexts() for stage in module.history(context))

    def summary(self) -> str:
        """Return what ran in the last run, what it cost, the speed-up that the multiply-accumulates bound, and what is kept.

        Multiply-accumulates are those of the sizes that were captured, which are those of the first call.
        """
        plan = self.plan
        ran = self.history()
        lines = [f"{plan.name}: {len(ran)} evaluations, {ran.count(REFRESH)} of them full"]
        if isinstance(plan, Plan):
            macs = plan.macs()
            spent, full = sum(macs[name] for name in ran), macs[REFRESH] * len(ran)
            lines += [
                f"  {name}: {value / 1e9:.4g} G MACs, {value / macs[REFRESH]:.1%}" for name, value in macs.items()
            ]
            if spent:
                lines.append(
                    f"  {spent / 1e9:.4g} of {full / 1e9:.4g} G MACs: at most {speedup_bound(macs, ran):.2f} times as fast"
                )
        kept = self._module().kept_bytes()
        lines.append(f"  {kept / 1e6:.4g} MB kept")
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
