"""Sampling runs of somebody else's loop, in which each evaluation of the denoiser is a full or a cheap one.

    def sample(denoise, generator):
        x = torch.randn(8, 4, 32, 32, generator=generator)
        for t in times:
            x = step(x, t, denoise(x, t.expand(8)))

The loop calls ``denoise`` as it would call the captured model: any sampler, guidance in one batch, and solvers with
several evaluations a step. What calls are for several conditions apart says so with ``denoise.cache_context(name)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..graph.errors import PreconditionError
from .gated_program import GatedProgram

Sample = Callable[["Denoiser", torch.Generator], Any]


@dataclass(frozen=True)
class Evaluation:
    """One cheap evaluation.

    Attributes:
        row: Its number among the cheap ones of a run.
        args: Inputs of the denoiser.
        kwargs: Inputs of the denoiser.
        kept: The branches of the last full evaluation by register.
    """

    row: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: Mapping[str, Tensor]


@dataclass
class _Run:
    index: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    shapes: tuple[Any, ...] = ()


class Denoiser:
    """Stands in for the denoiser in one sampling run.

    A full evaluation computes everything without gradients, and keeps all branches. So does a cheap one whose inputs
    have other shapes than those that were kept.

    Args:
        programs: The denoiser.
        evaluations: Of the run.
        cheap: Numbers of the cheap ones.
        at_cheap: Gives the result of a cheap evaluation.
        differentiable: Whether gradients go through the evaluations to those before. Then each is computed again on
            the way back, so that only its inputs and kept branches take memory until then.
    """

    def __init__(
        self,
        programs: GatedProgram,
        evaluations: int,
        cheap: Sequence[int],
        at_cheap: Callable[[Evaluation], Any],
        differentiable: bool = False,
    ) -> None:
        self._programs, self._evaluations, self._at_cheap = programs, evaluations, at_cheap
        self._differentiable = differentiable
        self._rows = {evaluation: row for row, evaluation in enumerate(cheap)}
        self._runs: dict[str, _Run] = {}
        self._context = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate: inputs and result are those of the denoiser.

        Raises:
            PreconditionError: The run has more evaluations than it should.
        """
        run = self._runs.setdefault(self._context, _Run())
        if run.index >= self._evaluations:
            raise self._other_length(f"{run.index + 1} times or more")
        index, run.index = run.index, run.index + 1
        # Tensors made in inference mode cannot enter autograd, whatever the mode.
        with torch.inference_mode(False), torch.set_grad_enabled(self._differentiable):
            args, kwargs = pytree.tree_map_only(Tensor, self._ordinary, (args, kwargs))
            leaves = pytree.tree_leaves((args, kwargs))
            shapes = tuple((v.shape, v.dtype, v.device) for v in leaves if isinstance(v, Tensor))
            if index in self._rows and run.kept and shapes == run.shapes:
                return self._evaluate(self._at_cheap, Evaluation(self._rows[index], args, kwargs, run.kept))
            result, run.kept = self._evaluate(self._programs.full, *args, **kwargs)
            run.shapes = shapes
            return result

    def _evaluate(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._differentiable:
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _ordinary(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return tensor.clone()
        return tensor if self._differentiable else tensor.detach()

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Let the evaluations inside be those of a run of their own, such as ``cond`` and ``uncond``."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def finish(self) -> None:
        """Raise `PreconditionError` unless every run had as many evaluations as it should."""
        for run in self._runs.values() or (_Run(),):
            if run.index != self._evaluations:
                raise self._other_length(f"{run.index} times")

    def _other_length(self, times: str) -> PreconditionError:
        return PreconditionError(
            f"sample called the denoiser {times} in a run, and the schedule is for {self._evaluations} evaluations; let it "
            "make one run of that many, or set evaluations to what it makes"
        )


def sampling_run(
    programs: GatedProgram,
    sample: Sample,
    generator: torch.Generator,
    evaluations: int,
    cheap: Sequence[int],
    at_cheap: Callable[[Evaluation], Any],
    differentiable: bool = False,
) -> Any:
    """Let ``sample`` make one run, and return what it returns; see `Denoiser`.

    Raises:
        PreconditionError: It did not call the denoiser ``evaluations`` times.
    """
    denoiser = Denoiser(programs, evaluations, cheap, at_cheap, differentiable)
    drawn = sample(denoiser, generator)
    denoiser.finish()
    return drawn


def require_cheap(evaluations: int, cheap: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of the cheap evaluations in order.

    Raises:
        PreconditionError: There is none, one is outside the run, or it is the first.
    """
    places = tuple(sorted(set(cheap)))
    if not places or places[0] < 1 or places[-1] >= evaluations:
        raise PreconditionError(
            f"the cheap evaluations of a run of {evaluations} must be numbers from 1 to {evaluations - 1}, since evaluation "
            f"0 is full, got {list(cheap)}"
        )
    return places


def require_picture(drawn: Any) -> Any:
    """Return what ``sample`` returned.

    Raises:
        PreconditionError: There is no tensor of floating point in it.
    """
    if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(drawn)):
        raise PreconditionError(
            f"sample returned {type(drawn).__name__}, and pictures are compared: let it return what it drew"
        )
    return drawn


def mean_squared(result: Any, reference: Any) -> Tensor:
    """Return the mean over all elements of all floating-point tensors of the squared difference, a scalar."""
    pairs = [
        (a.to(torch.promote_types(a.dtype, torch.float32)), b.to(torch.promote_types(b.dtype, torch.float32)))
        for a, b in zip(pytree.tree_leaves(result), pytree.tree_leaves(reference), strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    total = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return total / sum(a.numel() for a, _ in pairs)
