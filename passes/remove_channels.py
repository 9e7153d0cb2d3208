"""Remove channels, hidden units, heads and head dims by importance.

    before: h = relu(linear(x, w1[64, 32], b1[64])); y = linear(h, w2[10, 64])
    after:  h = relu(linear(x, w1[45, 32], b1[45])); y = linear(h, w2[10, 45])        ratio=0.3

Groups that cannot shrink are reported with the reason: ignored by the user, at their minimum width, frozen by
divisibility. The result carries the removal record. Paper: DepGraph: Towards Any Structural Pruning (2301.12900).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..graph.cost import cost
from ..graph.depgraph import DepGraph, depgraph
from ..graph.errors import PreconditionError
from ..graph.groups import CouplingGroup
from ..graph.isomorphism import isomorphism_classes
from ..graph.norm_groups import regrouped_norms
from ..graph.program import Program
from ..graph.resize import RemovalRecord, reconcile, resize, resized
from .base import Context, Pass, PassResult, Skipped
from .calibration import Threshold
from .criteria import CRITERIA
from .group_ratios import HEAD_KINDS, GroupRatios
from .importance import Scores, score_groups
from .ranking import ROUNDINGS, Limits, global_widths, legal_width, local_widths, select
from .reductions import Normaliser, Reduction, normaliser_of, reduction_of
from .removal_result import GroupWidth, RemovalResult, members_of_classes, removal_stats
from .targets import Target, quantity_of, solve, target_of

SCOPES = ("local", "global", "isomorphic")
# A group that would lose everything keeps what the limits say.
ALL = 1 - 1e-9


@dataclass(frozen=True)
class _Plan:
    """What one step removes: indices to keep by group, why a group was dropped, widths wanted before constraints."""

    keep: Mapping[str, list[int]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    wanted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """What one step plans with: the analysis, the scores, the widths before the pass, and classes in an isomorphic scope."""

    graph: DepGraph
    scored: Scores
    initial: Mapping[str, int]
    classes: Mapping[str, str] | None


@dataclass(frozen=True, kw_only=True)
class RemoveChannels(Pass):
    """Score every coupling group, rank in a scope, remove the least important indices.

    Attributes:
        ratio: Fraction of the indices of channel and hidden groups to remove, of the width before the pass.
        criterion: How a slice is scored: a key of `criteria.CRITERIA`. ``hessian``, ``obdc`` and Taylor need
            calibration.
        scope: ``local`` (every group loses the same fraction), ``global`` (all indices compete) or ``isomorphic`` (the
            indices of groups that run through the same operators compete, arXiv 2407.04616).
        reduction: How the members of a group are combined: a key of `reductions.REDUCTIONS` or, from Python, a function
            ``[members, size] -> [size]``.
        normaliser: How a group's scores are scaled before they compete. ``mean`` for a global scope compares indices
            relative to their group; ``none`` compares them as they are. A name that `reductions.normaliser_of` takes or,
            from Python, a function ``[size] -> [size]``.
        head_ratio: Fraction of attention heads (key-value heads where queries share them) to remove.
        head_group_ratio: Fraction of the query heads of each key-value head to remove.
        head_dim_ratio: Fraction of the dimensions of each head, of queries and keys and of values, to remove.
        ratios: Own ratios by glob over names of groups, modules or parameters, the first that matches wins.
        ignore: Globs over names of groups, modules and parameters; a group with a match keeps its width.
        max_ratio: No group loses more than this fraction.
        min_width: No group gets narrower than this.
        round_to: Keep widths a multiple of this.
        rounding: Where constraints do not allow a width: the ``nearest`` that they do, ``floor-removed`` (no more goes than
            was asked for) or ``floor-kept`` (no less goes).
        steps: Remove in this many steps, with new scores before each; the ratio grows linearly.
        macs: Fraction of the multiply-accumulates that may stay. With this, `parameters` or `latency`, all ratios are
            multiplied by one factor, the least that gets there; only their proportions matter.
        parameters: Fraction of the parameters that may stay.
        latency: Fraction of the latency that may stay, as `Context.latency` measures it.
        include_bias: Score biases too.
        loss_threshold: Calibrate on samples whose loss is above this fraction of the largest so far (arXiv 2305.10924).
        loss_stop: Whether the first sample below it ends the calibration; else all are looked at.
        seed: For the criterion ``random``.
    """

    name: ClassVar[str] = "remove-channels"
    only_resizes: ClassVar[bool] = True

    ratio: float = 0.5
    criterion: str = "magnitude-l2"
    scope: str = "local"
    reduction: str | Reduction = "mean"
    normaliser: str | Normaliser = "mean"
    head_ratio: float = 0.0
    head_group_ratio: float = 0.0
    head_dim_ratio: float = 0.0
    ratios: Mapping[str, float] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    max_ratio: float = 1.0
    min_width: int = 1
    round_to: int = 1
    rounding: str = "nearest"
    steps: int = 1
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    include_bias: bool = False
    loss_threshold: float = 0.0
    loss_stop: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ratio", "head_ratio", "head_group_ratio", "head_dim_ratio"):
            _in_range(name, getattr(self, name), 0.0, 1.0, "[0, 1)", below=True)
        for pattern, ratio in self.ratios.items():
            _in_range(f"ratios[{pattern!r}]", ratio, 0.0, 1.0, "[0, 1)", below=True)
        _in_range("max_ratio", self.max_ratio, 0.0, 1.0, "[0, 1]")
        _in_range("loss_threshold", self.loss_threshold, 0.0, 1.0, "[0, 1)", below=True)
        for name, known in (
            ("criterion", CRITERIA),
            ("scope", SCOPES),
            ("rounding", ROUNDINGS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        _ = reduction_of(self.reduction), normaliser_of(self.normaliser)
        for name in ("min_width", "round_to", "steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {getattr(self, name)!r}")

        _ = self._target

    @property
    def _target(self) -> Target | None:
        return target_of({"macs": self.macs, "parameters": self.parameters, "latency": self.latency})

    @property
    def _ratios(self) -> GroupRatios:
        heads = (self.head_ratio, self.head_group_ratio, self.head_dim_ratio)
        return GroupRatios(self.ratio, *heads, self.ratios, self.ignore)

    @property
    def _limits(self) -> Limits:
        return Limits(self.max_ratio, self.min_width, self.round_to, self.rounding)

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        before = cost(program)
        graph = ctx.analysis(depgraph, program)
        groups = graph.groups
        initial = {g.name: g.size for g in groups}
        if not initial:
            raise PreconditionError(f"{program.name} has no axis that can be removed: {_why_frozen(graph)}")
        self._ratios.check(self.name, program, initial)
        target = self._target
        stats = {} if target is None else {f"{target.quantity}_before": quantity_of(target, program, ctx)}
        record, plan = RemovalRecord(), _Plan()
        at = self._step(graph, program, ctx, initial)
        for step in range(1, self.steps + 1):
            if step > 1:
                at = self._step(ctx.analysis(depgraph, program), program, ctx, initial)
            part = step / self.steps
            if target is None:
                proposed = self._plan(at, part)
            else:
                goal = stats[f"{target.quantity}_before"] * (1 - (1 - target.fraction) * part)
                proposed = self._solved(target, goal, at, ctx)
                stats[f"{target.quantity}_requested"] = goal
            # Those before are of groups that reached width 1 since, and are none any more.
            plan = replace(proposed, wanted={**plan.wanted, **proposed.wanted})
            if plan.keep:
                record = record.then(resize(program, plan.keep, at.graph))
            ctx.report("removal", step, self.steps)
        widths = [_width(g, record, plan) for g in groups]
        stats |= removal_stats(initial, record, before, cost(program))
        if self.latency is not None and target is not None:
            stats["latency_after"] = quantity_of(target, program, ctx)
        # Of all steps together, against the widths at the beginning.
        regrouped = regrouped_norms(graph, {name: cut.kept for name, cut in record.groups.items()})
        if regrouped:
            stats["norms_regrouped"] = len(regrouped)
        classes = members_of_classes(at.classes or {})
        if classes:
            stats |= {"classes": len(classes), "classes_of_one": sum(len(c) == 1 for c in classes)}
        if at.scored.seen:
            stats |= {"calibration_samples_seen": at.scored.seen, "calibration_samples_used": at.scored.used}
        skipped = tuple(
            Skipped(w.group, self._why_whole(g, w, plan))
            for g, w in zip(groups, widths, strict=True)
            if w.after == w.before
        )
        return RemovalResult(
            bool(record.groups),
            stats,
            skipped,
            record,
            widths=tuple(widths),
            regrouped=regrouped,
            classes=classes,
        )

    def _solved(self, target: Target, goal: float, at: _Step, ctx: Context) -> _Plan:
        """Return the plan of the least factor for all ratios that reaches the goal."""
        ratios = [self._ratios.of(g) for g in at.scored.groups]
        program = at.graph.program

        def quantity(plan: _Plan) -> float:
            if not plan.keep:
                return quantity_of(target, program, ctx)
            # Most trials are only counted; what is removed in the end is verified.
            return quantity_of(target, resized(at.graph, plan.keep, check=target.quantity == "latency")[0], ctx)

        widest = 1 / min(ratios, default=1.0)
        return solve(target, goal, widest, lambda factor: self._plan(at, factor), quantity, ctx).plan

    def _plan(self, at: _Step, factor: float) -> _Plan:
        """Return what goes when every ratio is multiplied by ``factor``; ratios are of the initial widths."""
        groups, scores = at.scored.groups, at.scored.by_group
        ratios = {g.name: min(ALL, self._ratios.of(g) * factor) for g in groups}
        if self.scope == "local":
            wanted = local_widths(groups, ratios, at.initial)
        else:
            wanted = global_widths(groups, scores, ratios, at.initial, self._limits, at.classes)
        keep = {}
        for g in groups:
            # Alignment is about the widths of matrices; the number of heads is a batch dimension.
            limits = replace(self._limits, round_to=1) if g.kind in HEAD_KINDS else self._limits
            width = legal_width(g, wanted[g.name], at.initial[g.name], limits)
            if width < g.size:
                keep[g.name] = select(g, scores[g.name], width)
        keep, dropped = reconcile(at.graph, keep)
        return _Plan(keep, {**at.scored.unscored, **dropped}, wanted)

    def _step(self, graph: DepGraph, program: Program, ctx: Context, initial: Mapping[str, int]) -> _Step:
        """Score the groups that are to lose something, and find out which of them compete."""
        groups = [g for g in graph.groups if self._ratios.of(g) > 0 and g.name in initial]
        threshold = Threshold(self.loss_threshold, self.loss_stop) if self.loss_threshold else None
        how = (self.criterion, self.reduction, self.normaliser, self.include_bias)
        scored = score_groups(groups, program, how, ctx, self.seed, threshold)
        classes = isomorphism_classes(graph, scored.groups) if self.scope == "isomorphic" else None
        return _Step(graph, scored, initial, classes)

    def _why_whole(self, group: CouplingGroup, width: GroupWidth, plan: _Plan) -> str:
        """Say why a group kept its width."""
        if self._ratios.of(group) == 0:
            return "its ratio is 0 (ignored, or of a kind that was not asked for)"
        if group.name in plan.dropped:
            return plan.dropped[group.name]
        if width.wanted >= width.before:
            return "no index of it is among the least important of its scope"
        return (
            f"{width.before} of {width.before} stay where {width.wanted:.4g} were wanted: indices go in steps of "
            f"{group.step}, min_width {self.min_width}, max_ratio {self.max_ratio}, round_to {self.round_to}"
        )


def _width(group: CouplingGroup, record: RemovalRecord, plan: _Plan) -> GroupWidth:
    after = len(record.groups[group.name].kept) if group.name in record.groups else group.size
    return GroupWidth(group.name, group.kind, group.size, plan.wanted.get(group.name, float(group.size)), after)


def _why_frozen(graph: DepGraph) -> str:
    reasons = list(dict.fromkeys(f.reason for f in graph.frozen))
    return "every axis is frozen (" + "; ".join(reasons[:4]) + ")" if reasons else "it has no parameters"


def _in_range(name: str, value: float, low: float, high: float, text: str, below: bool = False) -> None:
    if not isinstance(value, (int, float)) or not low <= value <= high or (below and value == high):
        raise ValueError(f"{name} must be in {text}, got {value!r}")


__all__ = ["SCOPES", "GroupWidth", "RemovalResult", "RemoveChannels"]
