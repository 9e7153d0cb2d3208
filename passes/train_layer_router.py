"""Train a layer router on the sampler's own runs: no data, and the model's weights stay as they are.

    router = train_layer_router(program, sample, evaluations=20, rounds=200)
    router.save("router.safetensors")

``sample(denoise, generator)`` is the caller's sampling loop (see `sampling_runs`); one call of it is a round. With the
objective ``result`` the loss at cheap evaluation ``m`` is

    weight_m * mean((gated(x; sigmoid(w_m)) - model(x)) ** 2) + lam * sum(sigmoid(w_m))

and one step of AdamW changes the row ``w_m`` alone. ``weight_m`` is 1 where none is given. With the objective ``picture``
there is one loss and one step a round, for all rows:

    mean((picture(sigmoid(w)) - picture) ** 2) + lam * sum(sigmoid(w))

where the first picture is drawn with the gates at all cheap evaluations and the second without a cache, from one noise, and
the gradient goes back through the whole run. ``lam`` is in units of the mean squared difference, over batch and all elements;
what it means depends on how large that is when every branch is reused.

Papers: Learning-to-Cache (arXiv 2406.01733) for the gates and the loss of results; HarmoniCa (arXiv 2410.01723) for training
without images, and for following the cached run so that the error of earlier evaluations is seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..graph.errors import PreconditionError
from ..graph.program import Program
from ..graph.schedules import alternating
from .gated_program import gated_program
from .layer_router import LayerRouter
from .router_training import Settings, Training
from .sampling_runs import Sample, require_cheap

Progress = Callable[[str, int, int], None]


def train_layer_router(
    program: Program,
    sample: Sample,
    *,
    evaluations: int,
    cheap: Sequence[int] | None = None,
    lam: float | None = None,
    lam_of_all_reused: float = 0.01,
    lr: float = 0.1,
    weight_decay: float = 0.0,
    rounds: int = 200,
    seed: int = 0,
    clamp: tuple[float, float] | None = (-5.0, 5.0),
    follow: str = "teacher",
    threshold: float = 0.1,
    weights: Sequence[float] | None = None,
    objective: str = "result",
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_rounds: int = 10,
    resume: bool = False,
) -> LayerRouter:
    """Learn which branches each cheap evaluation of a sampling run can take from the full one before it.

    Before the rounds, one run measures the loss with every branch reused. The same seed gives the same router, as far
    as ``sample`` draws from the generator alone.

    Args:
        program: Captured from the denoiser, with weights. Neither it nor the model is changed, and no parameter gets a
            gradient.
        sample: ``sample(denoise, generator)`` makes one sampling run from noise, or from latents of its own, and calls
            ``denoise`` as the model is called. The generator is on the CPU. What it returns is used by `picture_weights`
            and the objective ``picture`` only.
        evaluations: Of a run: its steps, or twice as many for a solver that evaluates twice a step.
        cheap: Numbers of the evaluations that may reuse; by default every second one, ``alternating(evaluations)``.
        lam: Price of an open gate, in units of the mean (weighted) squared difference. None takes ``lam_of_all_reused``.
        lam_of_all_reused: The price as a share of that difference when every branch is reused, which means the same
            for every model: a higher one lets go of more branches.
        lr: Of AdamW, the most that a logit moves in a round. The paper's text says 0.01 and its published routers 0.001,
            with about two thousand steps for each evaluation; give as many ``rounds`` with these.
        weight_decay: Of AdamW.
        rounds: Sampling runs; each is one step for every cheap evaluation.
        seed: Of the first logits, which are normal, and of the generator.
        clamp: Bounds of the logits; None for none.
        follow: The run goes on with the full model's result (``teacher``), with that of the gates as they are
            (``student``), or as they will be (``thresholded``).
        threshold: Of the router that is returned.
        weights: Of the differences at each cheap evaluation, such as `picture_weights`; None for 1.
        objective: What is compared: the model's ``result`` at each cheap evaluation, or the ``picture`` that ``sample``
            returns, for which its loop must let gradients through (no ``torch.no_grad()``). A picture takes about twice
            the time, and the memory of one evaluation and of the branches that a run keeps.
        progress: Called with ``(what, rounds done, rounds)``.
        checkpoint: A file that holds the state of the training, replaced every ``checkpoint_rounds`` rounds.
        checkpoint_rounds: See there.
        resume: Go on from the checkpoint, if there is one, to exactly what one training without a break gives.

    Returns:
        The router. Its ``settings`` say what it was trained with, and of the last round and of the measured run the
        mean squared differences: one for each cheap evaluation, or that of the picture.

    Raises:
        PreconditionError: An option is out of range, ``sample`` makes another number of evaluations, the loss is not a
            number, or the checkpoint is of a training with other settings.
        ArtifactError: The checkpoint is damaged.
    """
    places = require_cheap(evaluations, alternating(evaluations) if cheap is None else cheap)
    weighted = (1.0,) * len(places) if weights is None else tuple(float(weight) for weight in weights)
    settings = Settings(
        cheap=places,
        lam=lam,
        lam_of_all_reused=lam_of_all_reused,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        clamp=clamp,
        follow=follow,
        threshold=threshold,
        evaluations=evaluations,
        weights=weighted,
        objective=objective,
    )
    training = Training(gated_program(program), settings, program.name)
    resumed = resume and checkpoint is not None and Path(checkpoint).is_file()
    if resumed and checkpoint is not None:
        training.restore(checkpoint)
    else:
        training.measure(sample)
    if training.done > rounds:
        raise PreconditionError(f"the checkpoint has {training.done} rounds behind it, and {rounds} are wanted")
    while training.done < rounds:
        training.round(sample)
        if progress is not None:
            progress(training.state(), training.done, rounds)
        if checkpoint is not None and (training.done % checkpoint_rounds == 0 or training.done == rounds):
            training.save(checkpoint)
    return training.router()
