"""Remove residual blocks: take whole branches away, so that the stream goes on as it came in.

    before: h = x + attention(norm(x)); y = h + mlp(norm(h)); z = y + attention(norm(y))
    after:  z = x + attention(norm(x))                                              block 0 removed

The graph computes then what the model computes with these branches zero, without their layers and parameters. A branch
whose layers are needed elsewhere, or without which no stream of that shape is left, is refused with the reason.

Scores: ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv 2403.03853) for ``influence``;
Isomorphic Pruning for Vision Models (arXiv 2407.04616) removes blocks of ConvNeXt by Taylor scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch.fx import Node

from ..graph.blocks import UNITS, Blocks, ResidualBlock, cut_branches, residual_blocks
from ..graph.cost import cost
from ..graph.dataflow import dataflow
from ..graph.errors import PreconditionError, unknown
from ..graph.program import Program
from ..graph.rewriter import Rewriter
from .base import Context, Pass, PassResult, Skipped
from .block_scores import BLOCK_CRITERIA, INFLUENCE, influences, weight_scores
from .reductions import REDUCTIONS
from .unread import erase_unseen

aten = torch.ops.aten


@dataclass(frozen=True)
class BlockFate:
    """What became of one block: its number, module and kinds of branches, its score if blocks were ranked."""

    number: int
    name: str
    kinds: tuple[str, ...]
    removed: bool
    score: float | None = None


@dataclass(frozen=True)
class BlockResult(PassResult):
    """A `PassResult` that also says what happened to each block.

    Attributes:
        blocks: All of them, in the order of the graph before the pass.
    """

    blocks: tuple[BlockFate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RemoveBlocks(Pass):
    """Take residual blocks away, the given ones or those with the lowest scores; the others keep their order.

    Attributes:
        blocks: Those that may go: numbers in graph order, or globs over names of modules (a stage means the blocks in it).
            Empty for all. Without ``count`` and ``ratio`` all of them go.
        ignore: Globs over names of modules and parameters; a block with a match stays.
        count: How many go, the least important first.
        ratio: Fraction of those that can go, rounded down.
        unit: ``block`` (a layer of a transformer with its attention and feed-forward) or ``branch`` (each of them).
        criterion: ``influence``, one minus the cosine of the stream before and after (2403.03853), or a criterion of
            `remove-channels` over the parameters of the block: magnitude, Taylor, Hessian, random.
        reduction: How the parameters of a block are combined; not for ``influence``.
        per_element: Divide the score of each parameter by the number of its elements, as 2407.04616 has it.
        seed: For the criterion ``random``.
    """

    name: ClassVar[str] = "remove-blocks"

    blocks: tuple[int | str, ...] = ()
    ignore: tuple[str, ...] = ()
    count: int | None = None
    ratio: float | None = None
    unit: str = "block"
    criterion: str = INFLUENCE
    reduction: str = "mean"
    per_element: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and self.ratio is not None:
            raise ValueError(f"count and ratio both say how many go: give one, got {self.count} and {self.ratio}")
        if self.count is not None and (type(self.count) is not int or self.count < 0):
            raise ValueError(f"count must be a whole number from 0, got {self.count!r}")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {self.ratio!r}")
        known = (("unit", UNITS), ("criterion", BLOCK_CRITERIA), ("reduction", tuple(REDUCTIONS)))
        for name, values in known:
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")

    def requires(self, program: Program) -> None:
        if not self.blocks and self.count is None and self.ratio is None:
            raise PreconditionError(f"{self.name} does not know what to take: give blocks, count or ratio")

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        before, found = cost(program), residual_blocks(program, self.unit)
        self._check_patterns(program, found)
        wanted = [block for block in found.blocks if self._may_go(block)]
        candidates = [block for block in wanted if not block.cut.refused]
        chosen, scores = self._chosen(program, candidates, wanted, ctx)
        cut = cut_branches(program, [join.branch for block in chosen for join in block.joins])
        if cut.refused:
            raise PreconditionError(f"{self.name} cannot take these blocks at once: {cut.refused}; take fewer")
        nodes, tensors = len(list(program.nodes)), len(program.tensors())
        _take_away(program, self.name, cut.left)
        after = cost(program)
        stats = {
            **({"blocks": len(found.blocks), "blocks_removed": len(chosen)} if self.unit == "block" else {}),
            "branches": sum(len(block.branches) for block in found.blocks),
            "branches_removed": sum(len(block.branches) for block in chosen),
            "nodes_removed": nodes - len(list(program.nodes)),
            "tensors_dropped": tensors - len(program.tensors()),
            "parameters_before": before.parameters,
            "parameters_after": after.parameters,
            "macs_before": before.total_macs,
            "macs_after": after.total_macs,
        }
        refused = [Skipped(block.name, block.cut.refused) for block in wanted if block.cut.refused]
        others = [Skipped(name, reason) for name, reason in found.others.items() if self._matches_any((name,))]
        gone = {block.number for block in chosen}
        fates = tuple(
            BlockFate(block.number, block.name, block.kinds, block.number in gone, scores.get(block.number))
            for block in found.blocks
        )
        return BlockResult(bool(chosen), stats, (*refused, *others), blocks=fates)

    def _chosen(
        self, program: Program, candidates: Sequence[ResidualBlock], wanted: Sequence[ResidualBlock], ctx: Context
    ) -> tuple[list[ResidualBlock], dict[int, float]]:
        """Return the blocks that go, in graph order, and the scores by number where there was a choice."""
        count = len(candidates) if self.count is None else self.count
        if self.ratio is not None:
            count = int(self.ratio * len(candidates) + 1e-9)
        if count > len(candidates) or (wanted and not candidates and self.count is None):
            why = next((f"; {b.name} cannot, since {b.cut.refused}" for b in wanted if b.cut.refused), "")
            raise PreconditionError(
                f"{self.name} is to take {count or 'some'} of {len(wanted)} blocks of {program.name}, and "
                f"{len(candidates)} of them can go{why}; lower count, or name others in blocks"
            )
        if count in (0, len(candidates)):
            return list(candidates[:count]), {}
        if self.criterion == INFLUENCE:
            values = influences(program, candidates, ctx)
        else:
            how = (self.criterion, self.reduction, self.per_element)
            values = weight_scores(program, candidates, *how, ctx, self.seed)
        # Of equal scores the later block goes: the first ones make the features that all others read.
        lowest = sorted(range(len(values)), key=lambda i: (values[i], -i))[:count]
        scores = {block.number: value for block, value in zip(candidates, values, strict=True)}
        return [candidates[i] for i in sorted(lowest)], scores

    def _may_go(self, block: ResidualBlock) -> bool:
        modules = (block.name, *(join.module for join in block.joins))
        if _matches(self.ignore, (*modules, *_modules_of(block.tensors), *block.tensors)):
            return False
        return not self.blocks or block.number in self.blocks or self._matches_any((block.name,))

    def _matches_any(self, names: Iterable[str]) -> bool:
        patterns = [pattern for pattern in self.blocks if isinstance(pattern, str)]
        return not self.blocks or _matches(patterns, names)

    def _check_patterns(self, program: Program, found: Blocks) -> None:
        """Raise `PreconditionError` for what names no block."""
        if not found.blocks:
            raise PreconditionError(
                f"{self.name} needs residual branches with layers in them, and {program.name} has none that starts and "
                "ends on one stream; to make such a network smaller use remove-channels"
            )
        names = [block.name for block in found.blocks]
        for entry in self.blocks:
            if isinstance(entry, str) and not _matches((entry,), (*names, *found.others)):
                raise PreconditionError(
                    unknown(f"blocks of {self.name}: no block of {program.name} matches", entry, names)
                )
            if isinstance(entry, str) and not _matches((entry,), names):
                name = next(name for name in found.others if _matches((entry,), (name,)))
                raise PreconditionError(f"{self.name} cannot take {name} away: {found.others[name]}")
            if isinstance(entry, int) and not 0 <= entry < len(names):
                raise PreconditionError(
                    f"{self.name} has no {self.unit} {entry}: {program.name} has {len(names)}, numbered from 0 to "
                    f"{len(names) - 1}"
                )
        known = [*names, *_modules_of(program.tensors()), *program.tensors()]
        for pattern in self.ignore:
            if not _matches((pattern,), known):
                raise PreconditionError(
                    unknown(f"ignore of {self.name}: nothing of {program.name} matches", pattern, names)
                )


def _matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether a glob matches one of the names, or a module that holds it."""
    globs = [glob for pattern in patterns for glob in (pattern, f"{pattern}.*")]
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _modules_of(tensors: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in tensors} - {""})


def _take_away(program: Program, rule: str, left: Mapping[Node, Node]) -> None:
    """Let what is left of each addition stand for it, and erase what is dead then."""
    flow, rewriter = dataflow(program), Rewriter(program, rule)
    placed: dict[Node, Node] = {}
    memory = dict(flow.memory)
    for node, other in left.items():
        stream = placed.get(other, other)
        own, shared = node.meta["val"], memory[node] | memory[stream]
        written = any(
            flow.order[writer] > flow.order[node] and makers & shared for writer, makers in flow.writes.items()
        )
        new = stream
        if own.dtype is not stream.meta["val"].dtype:
            new = rewriter.call(aten.to.dtype, stream, own.dtype, origin=node)
        elif written and memory[node] != memory[stream]:
            # The sum was a tensor of its own: what is written into it later must not be seen in the stream.
            new = rewriter.call(aten.clone.default, stream, origin=node)
        placed[node] = new
        memory.setdefault(new, memory[node])
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        # In place it would go on writing into what is left.
        program.graph_module.graph.erase_node(node)
    if left:
        erase_unseen(program)
        program.changed()
