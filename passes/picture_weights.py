"""What an error at one evaluation of a sampling run does to the finished picture, as weights for the training of a router.

    weights = picture_weights(program, sample, evaluations=20)
    router = train_layer_router(program, sample, evaluations=20, weights=weights)

The loss of a router compares results of the model. How much of a difference there arrives in the picture is the sampler's
matter: of the step it makes, of guidance that multiplies it, of what the evaluations after it make of it. So runs from one
noise are compared: that of the model, and for each cheap evaluation ``m`` one in which ``m`` alone reuses every branch.

    w_m = mean((picture_m - picture) ** 2) / mean((result_m - result) ** 2)

HarmoniCa (arXiv 2410.01723) weights its loss by such a proxy of the picture's error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import PreconditionError
from ..graph.program import Program
from ..graph.schedules import alternating
from .gated_program import GATE, gated_program
from .sampling_runs import Evaluation, Sample, mean_squared, require_cheap, require_picture, sampling_run


def picture_weights(
    program: Program,
    sample: Sample,
    *,
    evaluations: int,
    cheap: Sequence[int] | None = None,
    rounds: int = 2,
    seed: int = 0,
) -> tuple[float, ...]:
    """Return one weight for each cheap evaluation, in order: how far an error there moves the finished picture.

    They are scaled so that, when every branch is reused, the weighted errors have the mean of the unweighted ones.

    Args:
        program: As in `train_layer_router`.
        sample: As there, and it returns the picture: a tensor, or any structure with tensors. Runs of generators of the
            same state must be equal.
        evaluations: Of a run.
        cheap: Numbers of the cheap evaluations; by default every second one.
        rounds: Noises to average over, each of which takes one run and one more for every cheap evaluation.
        seed: Of the noises.

    Raises:
        PreconditionError: ``rounds`` is below 1, ``sample`` returns no tensor, or a difference is not a number; see also
            `train_layer_router`.
    """
    if rounds < 1:
        raise PreconditionError(f"rounds must be 1 or more, got {rounds}")
    places = require_cheap(evaluations, alternating(evaluations) if cheap is None else cheap)
    programs = gated_program(program)
    closed = torch.zeros_like(programs.open_gates)
    errors, moved = torch.zeros(len(places), dtype=torch.float64), torch.zeros(len(places), dtype=torch.float64)

    def picture(row: int | None, state: Tensor) -> Any:
        def at_cheap(at: Evaluation) -> Any:
            result = programs.plain(*at.args, **at.kwargs)
            if at.row != row:
                return result
            reused = programs.gated(*at.args, **at.kwargs, **at.kept, **{GATE: closed})
            errors[at.row] += float(mean_squared(reused, result))
            return reused

        generator = torch.Generator().manual_seed(0)
        generator.set_state(state)
        with torch.no_grad():
            return require_picture(sampling_run(programs, sample, generator, evaluations, places, at_cheap))

    for noise in range(rounds):
        state = torch.Generator().manual_seed(seed + noise).get_state()
        reference = picture(None, state)
        for row in range(len(places)):
            moved[row] += float(mean_squared(picture(row, state), reference))
    return _normalised(errors, moved)


def _normalised(errors: Tensor, moved: Tensor) -> tuple[float, ...]:
    """Return ``moved / errors``, scaled so that the weighted errors have the mean of the errors."""
    # An evaluation at which reusing everything changes nothing needs no weight.
    raw = torch.where(errors > 0, moved / errors.clamp_min(1e-300), torch.ones_like(errors))
    weighted = float((raw * errors).mean())
    if not math.isfinite(weighted):
        raise PreconditionError("a difference of pictures is not a number; check that the sampler draws finite ones")
    scale = float(errors.mean()) / weighted if weighted else 1.0
    return tuple((raw * scale).tolist())
