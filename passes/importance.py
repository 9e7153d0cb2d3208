"""Importance: how much each index of a coupling group matters.

A criterion scores the slices of one member; a reduction combines the members of a group; a normaliser makes groups
comparable. Each is a small function, and any goes with any:

    scores = normalise(reduce([criterion(member) for member in group]))          # [size of the group]

Formulas and defaults follow docs/methods/depgraph.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import PreconditionError
from ..graph.groups import CouplingGroup, Member
from ..graph.program import Program
from .activations import activation_means
from .base import Context
from .calibration import Gradients, Threshold, calibrate
from .criteria import (
    CRITERIA,
    NEEDS_GRADIENTS,
    NEEDS_SQUARED_GRADIENTS,
    UNJUDGED,
    Scoring,
    batch_norm_scales,
    layer_biases,
    layer_sides,
)
from .reductions import Normaliser, Reduction, normaliser_of, reduction_of
from .text import show_value


class NotScoredError(PreconditionError):
    """The criterion cannot judge a group: no member of it is of the kind that the criterion reads."""


def scoring_of(
    program: Program,
    criterion: str,
    ctx: Context | None = None,
    seed: int = 0,
    threshold: Threshold | None = None,
) -> Scoring:
    """Gather what ``criterion`` reads: the program's tensors and, if it needs them, calibration gradients.

    Args:
        program: To be scored.
        criterion: One of `CRITERIA`.
        ctx: Holds the calibration.
        seed: For random scores.
        threshold: Which calibration samples count; None for all.

    Raises:
        PreconditionError: The criterion needs gradients and ``ctx`` has no usable loss or batches.
    """
    gradients = Gradients()
    if criterion in NEEDS_GRADIENTS:
        gradients = calibrate(program, ctx or Context(), criterion in NEEDS_SQUARED_GRADIENTS, threshold)
    return Scoring(
        program.tensors(),
        gradients.sums,
        gradients.squared_means,
        activation_means(program, ctx or Context()) if criterion == "activation" else {},
        *layer_sides(program),
        batch_norm_scales(program),
        seed,
        gradients.losses,
        gradients.used,
        layer_biases(program),
    )


@dataclass(frozen=True)
class Scores:
    """Scores of several groups.

    Attributes:
        groups: Those that have scores.
        by_group: ``[group.size]`` by name.
        unscored: Why the others have none, by name.
        seen: How many calibration samples were looked at.
        used: How many of them counted.
    """

    groups: tuple[CouplingGroup, ...] = ()
    by_group: Mapping[str, Tensor] = field(default_factory=dict)
    unscored: Mapping[str, str] = field(default_factory=dict)
    seen: int = 0
    used: int = 0


def score_groups(
    groups: Sequence[CouplingGroup],
    program: Program,
    how: tuple[str, str | Reduction, str | Normaliser, bool],
    ctx: Context,
    seed: int = 0,
    threshold: Threshold | None = None,
) -> Scores:
    """Score every index of every group.

    Args:
        groups: Of ``program``.
        program: To be scored.
        how: Criterion, reduction, normaliser, and whether biases count.
        ctx: Holds the calibration; is told of the progress.
        seed: For random scores.
        threshold: Which calibration samples count; None for all.

    Raises:
        PreconditionError: As `scoring_of` and `importance`; or the criterion judges none of the groups.
    """
    if not groups:
        return Scores()
    scoring = scoring_of(program, how[0], ctx, seed, threshold)
    scores: dict[str, Tensor] = {}
    unscored: dict[str, str] = {}
    for i, group in enumerate(groups):
        try:
            scores[group.name] = importance(group, scoring, *how)
        except NotScoredError as err:
            unscored[group.name] = str(err)
        ctx.report("scoring", i + 1, len(groups))
    if not scores:
        raise PreconditionError(
            f"the criterion {how[0]} scores none of the {len(groups)} groups of {program.name} "
            f"({next(iter(unscored.values()))}); choose another criterion"
        )
    judged = tuple(g for g in groups if g.name in scores)
    return Scores(judged, scores, unscored, len(scoring.losses), len(scoring.used))


def scored_members(group: CouplingGroup, include_bias: bool) -> tuple[Member, ...]:
    """Return the members a criterion looks at: parameters, without one-dimensional biases unless asked for."""
    chosen = tuple(m for m in group.parameters if include_bias or not is_bias(m.name))
    return chosen or group.parameters


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias by its name: ``bias``, ``in_proj_bias``, ``bias_hh_l0``."""
    last = name.rsplit(".", 1)[-1]
    return last.endswith("bias") or last.startswith("bias_")


def importance(
    group: CouplingGroup,
    scoring: Scoring,
    criterion: str,
    reduction: str | Reduction = "mean",
    normaliser: str | Normaliser = "none",
    include_bias: bool = False,
) -> Tensor:
    """Score every index of ``group``.

    Args:
        group: To be scored.
        scoring: What ``criterion`` reads, as `scoring_of` gathers it.
        criterion: One of `CRITERIA`.
        reduction: One of `reductions.REDUCTIONS` or a function ``[members, size] -> [size]``.
        normaliser: What `normaliser_of` takes: a name or a function ``[size] -> [size]``.
        include_bias: Score one-dimensional biases too.

    Returns:
        ``[group.size]``, float64 on the CPU; higher matters more.

    Raises:
        NotScoredError: The criterion cannot judge any member of the group.
        PreconditionError: The weights are on the meta device, a score is not finite, or a function of the caller's returns
            something else than one score an index.
    """
    members = scored_members(group, include_bias)
    if criterion != "random" and any(scoring.tensors[m.name].is_meta for m in members):
        raise PreconditionError(
            f"{criterion} reads weights, and {members[0].name!r} is on the meta device; "
            'load the weights, or plan with criterion="random"'
        )
    scores = CRITERIA[criterion](scoring, group, members)
    if not scores:
        reason = UNJUDGED.get(criterion, "no member of it received a gradient")
        raise NotScoredError(f"{criterion} cannot score the group {group.name!r}: {reason}")
    reduced = _one_each(reduction_of(reduction)(torch.stack([s.double().cpu() for s in scores])), reduction, group)
    result = _one_each(normaliser_of(normaliser)(reduced), normaliser, group)
    if not bool(torch.isfinite(result).all()):
        bad = [m.name for m in members if not bool(torch.isfinite(scoring.tensors[m.name]).all())]
        cause = (
            f"{', '.join(map(repr, bad))} has values that are not finite" if bad else "they overflow, or a gradient is"
        )
        raise PreconditionError(
            f"{criterion} gives scores that are not finite for the group {group.name!r}: {cause}; repair the weights, "
            "check the calibration batches, or leave the group out with ignore"
        )
    return result


def _one_each(scores: Any, function: Any, group: CouplingGroup) -> Tensor:
    """Return the scores as float64 on the CPU, if ``function`` gave one for each index of the group."""
    if isinstance(scores, Tensor) and scores.shape == (group.size,) and not scores.is_complex():
        return scores.detach().double().cpu()
    got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    raise PreconditionError(
        f"{show_value(function)} returned {got} for the group {group.name!r}; it must return one real score for each "
        f"index, a tensor of the shape [{group.size}]"
    )
