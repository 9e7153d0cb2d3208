"""What passes of a recipe may use beyond the program: a loss with batches for gradients, a sampling loop to learn on."""

from __future__ import annotations

from ..graph.errors import PreconditionError
from ..passes.base import Context, Progress
from .factories import call_factory
from .recipe_schema import Factory


def context_of(
    calibration: Factory | None, progress: Progress | None = None, sampling: Factory | None = None
) -> Context:
    """Return the context of passes, with the calibration loss and batches and the sampling loop if there are any.

    Raises:
        PreconditionError: The factory cannot be found, does not take its options, or returns something else than
            ``(loss, batches)``.
    """
    sample = None
    if sampling is not None:
        sample = call_factory("sampling", sampling)
        if not callable(sample):
            raise PreconditionError(
                f"sampling {sampling.factory} must return sample(denoise, generator), got {type(sample).__name__}"
            )
    if calibration is None:
        return Context(sample=sample, progress=progress)
    made = call_factory("calibration", calibration)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise PreconditionError(
            f"calibration {calibration.factory} must return (loss, batches) with loss(program, batch), or "
            f"(loss, batches, split), got {type(made).__name__}"
        )
    loss, batches, split = made if len(made) == 3 else (*made, None)
    return Context(loss=loss, batches=list(batches), split=split, sample=sample, progress=progress)
