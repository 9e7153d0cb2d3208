"""Which fraction of its indices each coupling group loses: by its kind, or by patterns over names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..graph.errors import PreconditionError, unknown
from ..graph.groups import CouplingGroup
from ..graph.program import Program

HEAD_KINDS = ("head", "head group")
HEAD_DIM_KINDS = ("head dim", "value dim")


@dataclass(frozen=True)
class GroupRatios:
    """Fractions of the indices to remove, each in [0, 1).

    Attributes:
        channels: Of groups that are neither heads nor head dims.
        heads: Of attention heads, of key-value heads where queries share them.
        head_groups: Of the query heads of each key-value head.
        head_dims: Of the dimensions of each head.
        own: By glob over names of groups, modules or parameters; the first that matches wins.
        ignore: Globs; a group with a match loses nothing.
    """

    channels: float
    heads: float
    head_groups: float
    head_dims: float
    own: Mapping[str, float]
    ignore: tuple[str, ...]

    def of(self, group: CouplingGroup) -> float:
        """Return the fraction that ``group`` loses."""
        tensors = [m.name for m in group.members]
        if any(_matches(pattern, (group.name,), tensors) for pattern in self.ignore):
            return 0.0
        for pattern, ratio in self.own.items():
            if _matches(pattern, (group.name,), tensors):
                return ratio
        if group.kind == "head":
            return self.heads
        if group.kind == "head group":
            return self.head_groups
        return self.head_dims if group.kind in HEAD_DIM_KINDS else self.channels

    def check(self, rule: str, program: Program, groups: Iterable[str]) -> None:
        """Raise `PreconditionError` for a pattern that matches nothing of ``program``.

        Args:
            rule: Name of the pass, for the message.
            program: Whose tensors and modules may be named.
            groups: Names of its groups.
        """
        # Groups that an earlier pass took to width 1 are none any more, but their names are no mistakes.
        known = {*groups, *(n.name for n in program.group_names)}
        for option, patterns in (("ignore", self.ignore), ("ratios", self.own)):
            for pattern in patterns:
                if not _matches(pattern, known, program.tensors()):
                    modules = {name.rpartition(".")[0] for name in program.tensors()} - {""}
                    raise PreconditionError(
                        unknown(f"{option} of {rule}: nothing of {program.name} matches", pattern, [*modules, *groups])
                    )


def _matches(pattern: str, groups: Iterable[str], tensors: Iterable[str]) -> bool:
    """Whether a glob matches one of the groups, one of the tensors or the module of one of the tensors."""
    # The second group of a layer is called NAME.2: it is no part of the first.
    return any(fnmatchcase(name, pattern) for name in groups) or any(
        fnmatchcase(name, glob) for glob in (pattern, f"{pattern}.*") for name in tensors
    )
