"""What passes of a recipe may use beyond the program: losses with batches, a sampling loop to learn on, a stop-watch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..graph.errors import PreconditionError
from ..passes.base import Context, Progress
from .factories import call_factory
from .latency import latency_of
from .recipe_schema import Recipe


def context_of(recipe: Recipe, progress: Progress | None = None, checkpoints: Path | None = None) -> Context:
    """Return the context of a recipe's passes: calibration, training and sampling if there are any.

    Args:
        recipe: Whose factories are called.
        progress: Told of long work.
        checkpoints: Where long work leaves what it has done.

    Raises:
        PreconditionError: A factory cannot be found, does not take its options, or returns something else than it is
            asked for.
    """
    loss, batches, split = _losses(recipe, "calibration", (2, 3), (None, (), None))
    training_loss, training, _ = _losses(recipe, "training", (2,), (None, None, None))
    return Context(
        loss=loss,
        batches=list(batches),
        split=split,
        training_loss=training_loss,
        training=training,
        sample=_sampling(recipe),
        latency=latency_of(recipe.measure, recipe.export.onnx),
        progress=progress,
        checkpoints=checkpoints,
    )


def _losses(recipe: Recipe, key: str, lengths: tuple[int, ...], none: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return ``(loss, batches, split or None)`` of the factory under ``key``; ``none`` where there is none."""
    factory = getattr(recipe, key)
    if factory is None:
        return none
    made = call_factory(key, factory)
    if not isinstance(made, tuple) or len(made) not in lengths or not callable(made[0]):
        also = ", or (loss, batches, split)" if 3 in lengths else ""
        raise PreconditionError(
            f"{key} {factory.factory} must return (loss, batches) with loss(program, batch){also}, got "
            f"{type(made).__name__}"
        )
    return made if len(made) == 3 else (*made, None)


def _sampling(recipe: Recipe) -> Callable[..., Any] | None:
    if recipe.sampling is None:
        return None
    sample = call_factory("sampling", recipe.sampling)
    if not callable(sample):
        raise PreconditionError(
            f"sampling {recipe.sampling.factory} must return sample(denoise, generator), got {type(sample).__name__}"
        )
    return sample
