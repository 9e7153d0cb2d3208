"""Calibration of a recipe: the loss and the batches that gradient criteria need."""

from __future__ import annotations

from ..graph.errors import PreconditionError
from ..passes.base import Context, Progress
from .factories import call_factory
from .recipe_schema import Factory


def context_of(calibration: Factory | None, progress: Progress | None = None) -> Context:
    """Return the context of passes, with the calibration loss and batches if there are any.

    Raises:
        PreconditionError: The factory cannot be found, does not take its options, or returns something else than
            ``(loss, batches)``.
    """
    if calibration is None:
        return Context(progress=progress)
    made = call_factory("calibration", calibration)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise PreconditionError(
            f"calibration {calibration.factory} must return (loss, batches) with loss(program, batch), or "
            f"(loss, batches, split), got {type(made).__name__}"
        )
    loss, batches, split = made if len(made) == 3 else (*made, None)
    return Context(loss=loss, batches=list(batches), split=split, progress=progress)
