"""Sparse training: a penalty that makes whole coupling groups small at the same indices, before they are removed.

    for batch in data:
        loss(model(batch)).backward()
        for name, gradient in group_lasso_gradients(graph, Scoring(program.tensors()), 1e-4).items():
            model.get_parameter(name).grad += gradient
        optimizer.step()                                          # with a weight decay of 0

The penalty is ``R = strength / 2 * sum_g sum_k gamma_k * I_gk`` with ``I_gk`` the squared norm of everything that goes
with index ``k`` of group ``g``, and ``gamma`` held fixed. All coupled slices of an index shrink by the same factor, the
least important index up to ``2**alpha`` times as fast as the most important one. Nothing here changes a parameter.

`PENALTIES` lists the kinds by name; each is a `Penalty`, which `train` (passes/trainer.py) calls at every step:

    penalty = PENALTIES["group-lasso"](depgraph(program), 5e-4)
    train(program.module(), loss, batches, Training(steps=1000), penalty=penalty)

Papers: DepGraph: Towards Any Structural Pruning (arXiv 2301.12900), section 3.3; Network Slimming (1708.06519); Neural
Pruning via Growing Regularization (2012.09243).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph.depgraph import DepGraph
from ..graph.errors import PreconditionError
from ..graph.groups import CouplingGroup, Member
from .criteria import Scoring, batch_norm_scales
from .importance import importance

# alpha of the paper: shrinkage strengths from 1 to 16.
ALPHA = 4.0
# Scores that differ by less than this fraction of the largest are equal: sums of equal weights differ by rounding.
EQUAL = 1e-6


def shrinkage_strengths(scores: Tensor, alpha: float = ALPHA) -> Tensor:
    """Return ``gamma_k = 2 ** (alpha * (max(I) - I_k) / (max(I) - min(I)))``.

    Args:
        scores: Importance of the indices of one group, ``[size]``.
        alpha: Exponent of the least important index.

    Returns:
        ``[size]``, from 1 (most important) to ``2 ** alpha`` (least); all ones when all scores are equal but for rounding.

    Raises:
        ValueError: ``alpha`` is negative, or a score is not finite.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0, got {alpha!r}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the scores must be finite; one of them is infinite or not a number")
    spread = scores.amax() - scores.amin()
    if float(spread) <= EQUAL * float(scores.abs().amax()):
        return torch.ones_like(scores)
    return 2.0 ** (alpha * ((scores.amax() - scores) / spread))


def group_importance(group: CouplingGroup, scoring: Scoring) -> Tensor:
    """Return ``I_k``: the squared norm of all parameters at index ``k``, biases included, ``[group.size]``."""
    return importance(group, scoring, "magnitude-l2", "sum", include_bias=True)


def group_lasso_gradients(
    graph: DepGraph,
    scoring: Scoring,
    strength: float,
    alpha: float = ALPHA,
    kinds: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of the penalty by parameter name: ``strength * gamma_k * w`` on all slices of index ``k``.

    An element that lies in several groups (output channel of one, input channel of another) gets the sum.

    Args:
        graph: Coupling analysis of the model that is trained.
        scoring: Its tensors as they are now. A captured program shares them with the caller's model.
        strength: Weight of the penalty; 1e-4 to 5e-4 in the paper's experiments.
        alpha: See `shrinkage_strengths`.
        kinds: Only groups of these kinds, such as ``("channel", "hidden")``; all without.

    Returns:
        New tensors of the parameters' shapes and dtypes, under the names of the program. Parameters with
        ``requires_grad=False`` are left out. A tied parameter is listed once, under its first name.

    Raises:
        ValueError: ``strength`` or ``alpha`` is negative.
        PreconditionError: A weight is not finite, or on the meta device.
    """
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength!r}")
    strengths = {
        g.name: strength * shrinkage_strengths(group_importance(g, scoring), alpha)
        for g in graph.groups
        if kinds is None or g.kind in kinds
    }
    return _decay(graph, scoring, strengths)


def _decay(graph: DepGraph, scoring: Scoring, strengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients ``strength_k * w`` on all slices of index ``k``, given ``[size]`` by group."""
    factors: dict[str, Tensor] = {}
    for group in graph.groups:
        if group.name not in strengths:
            continue
        for member in group.parameters:
            tensor = scoring.tensors[member.name]
            if tensor.requires_grad:
                factor = _per_element(strengths[group.name], member, tensor)
                factors[member.name] = factors[member.name] + factor if member.name in factors else factor
    return {
        name: factor.to(scoring.tensors[name].dtype) * scoring.tensors[name].detach()
        for name, factor in factors.items()
    }


def _per_element(gamma: Tensor, member: Member, tensor: Tensor) -> Tensor:
    """Spread ``[size of the axis]`` over the member's dimension; broadcasts with the tensor."""
    index = torch.from_numpy(member.positions())  # [size of the axis, k]
    line = torch.zeros(tensor.shape[member.dim], dtype=gamma.dtype)
    line[index.flatten()] = gamma[:, None].expand(index.shape).flatten()
    shape = [1] * tensor.dim()
    shape[member.dim] = -1
    return line.view(shape).to(tensor.device)


# ---------------------------------------------------------------------- penalties that a training calls at every step


@dataclass
class Penalty:
    """More gradients for a training, by parameter name.

    Attributes:
        graph: Coupling analysis of the program that is trained.
        strength: Weight of the penalty.
    """

    graph: DepGraph
    strength: float

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength must be at least 0, got {self.strength!r}")

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients for the tensors as they are now."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""


class GroupLasso(Penalty):
    """`group_lasso_gradients` on all groups."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients for the tensors as they are now."""
        return group_lasso_gradients(self.graph, Scoring(tensors), self.strength)


class BatchNormScale(Penalty):
    """``strength * sign(gamma)`` on the weights of all batch norms (Network Slimming, arXiv 1708.06519)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scales = sorted(batch_norm_scales(self.graph.program))
        if not self.scales:
            raise PreconditionError(
                f"{self.graph.program.name} has no batch norm with a weight: take the penalty group-lasso"
            )

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients for the tensors as they are now."""
        found = {name: tensors[name] for name in self.scales if tensors[name].requires_grad}
        return {name: self.strength * tensor.detach().sign() for name, tensor in found.items()}


@dataclass
class Growing(Penalty):
    """A decay of every index that grows, fastest for the least important (arXiv 2012.09243).

    The strength of an index starts at ``strength`` and is raised every ``every`` calls by ``strength`` times
    ``(max(I) - I_k) / (max(I) - min(I))``.

    Attributes:
        every: Calls between two raises.
    """

    every: int = 100
    strengths: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients for the tensors as they are now, and count the call."""
        scoring = Scoring(tensors)
        for group in self.graph.groups:
            if group.name not in self.strengths:
                self.strengths[group.name] = torch.full((group.size,), self.strength, dtype=torch.float64)
            elif self.calls % self.every == 0:
                scores = group_importance(group, scoring)
                spread = scores.amax() - scores.amin()
                if float(spread) > EQUAL * float(scores.abs().amax()):
                    self.strengths[group.name] += self.strength * (scores.amax() - scores) / spread
        self.calls += 1
        return _decay(self.graph, scoring, self.strengths)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"calls": self.calls, "strengths": dict(self.strengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.calls, self.strengths = state["calls"], dict(state["strengths"])


PENALTIES: dict[str, Callable[[DepGraph, float], Penalty]] = {
    "bn-scale": BatchNormScale,
    "group-lasso": GroupLasso,
    "growing": Growing,
}
