"""Remove channels, hidden units, heads and head dims by importance.

    before: h = relu(linear(x, w1[64, 32], b1[64])); y = linear(h, w2[10, 64])
    after:  h = relu(linear(x, w1[45, 32], b1[45])); y = linear(h, w2[10, 45])        ratio=0.3

Groups that cannot shrink are reported with the reason: ignored by the user, at their minimum width, frozen by
divisibility. The result carries the removal record. Paper: DepGraph: Towards Any Structural Pruning (2301.12900).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor

from ..graph.cost import cost
from ..graph.depgraph import DepGraph, depgraph
from ..graph.errors import PreconditionError, unknown
from ..graph.groups import CouplingGroup
from ..graph.isomorphism import isomorphism_classes
from ..graph.program import Program
from ..graph.resize import RemovalRecord, reconcile, resize
from .base import Context, Pass, PassResult, Skipped
from .calibration import Threshold
from .criteria import CRITERIA
from .importance import NotScoredError, importance, scoring_of
from .ranking import ROUNDINGS, Limits, global_widths, legal_width, local_widths, select
from .reductions import NORMALISERS, REDUCTIONS

SCOPES = ("local", "global", "isomorphic")
HEAD_KINDS = ("head", "head group")
HEAD_DIM_KINDS = ("head dim", "value dim")


@dataclass(frozen=True)
class GroupWidth:
    """What happened to one coupling group: its widths before and after, and what was asked for."""

    group: str
    kind: str
    before: int
    wanted: float
    after: int


@dataclass(frozen=True)
class RemovalResult(PassResult):
    """A `PassResult` that also lists every group's widths."""

    widths: tuple[GroupWidth, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What one step removes: indices to keep by group, why a group was dropped, widths wanted before constraints.

    ``samples`` are the calibration samples that were looked at, and those that counted.
    """

    keep: Mapping[str, list[int]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    wanted: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class RemoveChannels(Pass):
    """Score every coupling group, rank in a scope, remove the least important indices.

    Attributes:
        ratio: Fraction of the indices of channel and hidden groups to remove, of the width before the pass.
        criterion: How a slice is scored: a key of `criteria.CRITERIA`. ``hessian`` and Taylor need calibration.
        scope: ``local`` (every group loses the same fraction), ``global`` (all indices compete) or ``isomorphic`` (the
            indices of groups that run through the same operators compete, arXiv 2407.04616).
        reduction: How the members of a group are combined.
        normaliser: How a group's scores are scaled before they compete. ``mean`` for a global scope compares indices
            relative to their group; ``none`` compares them as they are.
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
    reduction: str = "mean"
    normaliser: str = "mean"
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
            ("reduction", REDUCTIONS),
            ("normaliser", NORMALISERS),
            ("scope", SCOPES),
            ("rounding", ROUNDINGS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("min_width", "round_to", "steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {getattr(self, name)!r}")

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        before = cost(program)
        graph = ctx.analysis(depgraph, program)
        groups = graph.groups
        initial = {g.name: g.size for g in groups}
        if not initial:
            raise PreconditionError(f"{program.name} has no axis that can be removed: {_why_frozen(graph)}")
        # Groups that an earlier pass took to width 1 are none any more, but their names are no mistakes.
        known = {*initial, *(n.name for n in program.group_names)}
        for option, patterns in (("ignore", self.ignore), ("ratios", self.ratios)):
            for pattern in patterns:
                if not _matches(pattern, known, program.tensors()):
                    modules = {name.rpartition(".")[0] for name in program.tensors()} - {""}
                    raise PreconditionError(
                        unknown(
                            f"{option} of {self.name}: nothing of {program.name} matches", pattern, [*modules, *initial]
                        )
                    )
        record, plan = RemovalRecord(), _Plan()
        for step in range(1, self.steps + 1):
            graph = ctx.analysis(depgraph, program)
            before_step = plan.wanted  # of groups that reached width 1 since, and are none any more
            plan = self._plan(graph, program, ctx, initial, step / self.steps)
            plan = replace(plan, wanted={**before_step, **plan.wanted})
            if plan.keep:
                record = record.then(resize(program, plan.keep, graph))
            ctx.report("removal", step, self.steps)
        after = cost(program)
        widths = [_width(g, record, plan) for g in groups]
        stats = {
            "groups": len(initial),
            "groups_shrunk": len(record.groups),
            "indices_before": sum(initial.values()),
            "indices_removed": sum(c.of - len(c.kept) for c in record.groups.values()),
            "parameters_before": before.parameters,
            "parameters_after": after.parameters,
            "macs_before": before.total_macs,
            "macs_after": after.total_macs,
        }
        if plan.samples[0]:
            stats["calibration_samples_seen"], stats["calibration_samples_used"] = plan.samples
        skipped = tuple(
            Skipped(w.group, self._why_whole(g, w, plan))
            for g, w in zip(groups, widths, strict=True)
            if w.after == w.before
        )
        return RemovalResult(bool(record.groups), stats, skipped, record, widths=tuple(widths))

    def _plan(self, graph: DepGraph, program: Program, ctx: Context, initial: Mapping[str, int], part: float) -> _Plan:
        ratios = {g.name: self._ratio(g) * part for g in graph.groups}
        groups = [g for g in graph.groups if ratios[g.name] > 0 and g.name in initial]
        if not groups:
            return _Plan()
        scores, unscored, samples = self._scores(groups, program, ctx)
        groups = [g for g in groups if g.name in scores]
        if self.scope == "local":
            wanted = local_widths(groups, ratios, initial)
        else:
            classes = isomorphism_classes(graph, groups) if self.scope == "isomorphic" else None
            wanted = global_widths(groups, scores, ratios, initial, Limits(self.max_ratio, self.min_width), classes)
        keep = {}
        for g in groups:
            # Alignment is about the widths of matrices; the number of heads is a batch dimension.
            align = 1 if g.kind in HEAD_KINDS else self.round_to
            width = legal_width(
                g, wanted[g.name], initial[g.name], Limits(self.max_ratio, self.min_width, align, self.rounding)
            )
            if width < g.size:
                keep[g.name] = select(g, scores[g.name], width)
        keep, dropped = reconcile(graph, keep)
        return _Plan(keep, unscored | dropped, wanted, samples)

    def _scores(
        self, groups: Sequence[CouplingGroup], program: Program, ctx: Context
    ) -> tuple[dict[str, Tensor], dict[str, str], tuple[int, int]]:
        """Return the scores by group, why a group has none, and how many samples were looked at and counted."""
        threshold = Threshold(self.loss_threshold, self.loss_stop) if self.loss_threshold else None
        scoring = scoring_of(program, self.criterion, ctx, self.seed, threshold)
        scores: dict[str, Tensor] = {}
        unscored: dict[str, str] = {}
        for i, g in enumerate(groups):
            try:
                scores[g.name] = importance(
                    g, scoring, self.criterion, self.reduction, self.normaliser, self.include_bias
                )
            except NotScoredError as err:
                unscored[g.name] = str(err)
            ctx.report("scoring", i + 1, len(groups))
        if not scores:
            reason = next(iter(unscored.values()))
            raise PreconditionError(
                f"the criterion {self.criterion} scores none of the {len(groups)} groups of {program.name} "
                f"({reason}); choose another criterion"
            )
        return scores, unscored, (len(scoring.losses), len(scoring.used))

    def _ratio(self, group: CouplingGroup) -> float:
        tensors = [m.name for m in group.members]
        if any(_matches(pattern, (group.name,), tensors) for pattern in self.ignore):
            return 0.0
        for pattern, ratio in self.ratios.items():
            if _matches(pattern, (group.name,), tensors):
                return ratio
        if group.kind == "head":
            return self.head_ratio
        if group.kind == "head group":
            return self.head_group_ratio
        return self.head_dim_ratio if group.kind in HEAD_DIM_KINDS else self.ratio

    def _why_whole(self, group: CouplingGroup, width: GroupWidth, plan: _Plan) -> str:
        """Say why a group kept its width."""
        if self._ratio(group) == 0:
            return "its ratio is 0 (ignored, or of a kind that was not asked for)"
        if group.name in plan.dropped:
            return plan.dropped[group.name]
        if width.wanted >= width.before:
            return "no index of it is among the least important of its scope"
        return (
            f"{width.before} of {width.before} stay where {width.wanted:.4g} were wanted: indices go in steps of "
            f"{group.step}, min_width {self.min_width}, max_ratio {self.max_ratio}, round_to {self.round_to}"
        )


def _matches(pattern: str, groups: Iterable[str], tensors: Iterable[str]) -> bool:
    """Whether a glob matches one of the groups, one of the tensors or the module of one of the tensors."""
    # The second group of a layer is called NAME.2: it is no part of the first.
    return any(fnmatchcase(name, pattern) for name in groups) or any(
        fnmatchcase(name, glob) for glob in (pattern, f"{pattern}.*") for name in tensors
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
