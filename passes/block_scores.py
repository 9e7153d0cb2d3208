"""Scores of residual blocks: how much would be missing without them.

`influence` compares the stream before and after a block; the other criteria are those of `criteria`, of whole tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.axes import PRODUCT, Axis
from ..graph.blocks import ResidualBlock
from ..graph.cost import example_shape
from ..graph.errors import PreconditionError
from ..graph.groups import CouplingGroup, Member
from ..graph.operators import is_convolution
from ..graph.program import Program
from ..graph.rewriter import Rewriter
from .base import Context
from .importance import NotScoredError, importance, scoring_of
from .reductions import REDUCTIONS
from .slices import wide
from .watched import calibration_values

INFLUENCE = "influence"
# Those of `criteria.CRITERIA` that say something of a whole tensor.
BLOCK_CRITERIA = (
    INFLUENCE,
    "hessian",
    "magnitude-l1",
    "magnitude-l2",
    "random",
    "taylor",
    "taylor-multivariable",
    "taylor-squared",
)


def influences(program: Program, blocks: Sequence[ResidualBlock], ctx: Context) -> list[float]:
    """Return the block influence, ``1 - mean cosine(stream before, stream after)``, over ``ctx.batches`` (2403.03853).

    The cosine is of the features at every position. A block on several streams has the mean of theirs.

    Raises:
        PreconditionError: There is no loss that calls the program, or no batch.
    """
    work, ends = _watchable(program, [pair for block in blocks for pair in _streams(block)])
    sums, positions = [0.0] * len(ends), [0] * len(ends)
    for values in calibration_values(work, [name for before, after, _ in ends for name in (before, after)], ctx):
        for i, (_, _, dim) in enumerate(ends):
            before, after = wide(values[2 * i]), wide(values[2 * i + 1])
            cosine = torch.nn.functional.cosine_similarity(before, after, dim)
            sums[i] += float(cosine.double().sum())
            positions[i] += cosine.numel()
    apart = iter([1 - total / count for total, count in zip(sums, positions, strict=True)])
    found = [[next(apart) for _ in _streams(block)] for block in blocks]
    return [sum(values) / len(values) for values in found]


def weight_scores(
    program: Program,
    blocks: Sequence[ResidualBlock],
    criterion: str,
    reduction: str,
    per_element: bool,
    ctx: Context,
    seed: int,
) -> list[float]:
    """Score blocks by their parameters: ``reduce(criterion(tensor) for tensor in block)``.

    Args:
        program: That the blocks are of.
        blocks: To be scored.
        criterion: One of `BLOCK_CRITERIA` other than `INFLUENCE`.
        reduction: Of the parameters of a block.
        per_element: Whether the score of a tensor is divided by the number of its elements.
        ctx: Holds the calibration.
        seed: For ``random``.

    Raises:
        PreconditionError: As `scoring_of` and `importance`, or the criterion judges no parameter of a block.
    """
    scoring, parameters = scoring_of(program, criterion, ctx, seed), program.parameters()
    scores = []
    for i, block in enumerate(blocks):
        label = f"{block.number}:{block.name}"
        own = {name: parameters[name] for name in block.tensors if name in parameters and parameters[name].dim()}
        found = []
        for name, tensor in own.items():
            group = _whole(label if criterion == "random" else name, name, tensor)
            try:
                score = importance(group, scoring, criterion, include_bias=True)
            except NotScoredError:
                continue
            found.append(score / tensor.numel() if per_element and criterion != "random" else score)
        if not found:
            raise PreconditionError(
                f"{criterion} scores none of the {len(own)} parameters of the block {block.name}; choose another criterion"
            )
        scores.append(float(REDUCTIONS[reduction](torch.stack(found))))
        ctx.report("scoring", i + 1, len(blocks))
    return scores


def _whole(label: str, name: str, tensor: Tensor) -> CouplingGroup:
    """Return a tensor as a group of one index, to which all of it belongs."""
    leaf, size = Axis(1), int(tensor.shape[0])
    layout = Axis(size, PRODUCT, (leaf, Axis(size)))
    return CouplingGroup(label, "tensor", 1, (Member(name, 0, True, layout, leaf),), "exact", (), (), 1, 1, leaf)


# ---------------------------------------------------------------------- the stream before and after


def _streams(block: ResidualBlock) -> list[tuple[Node, Node]]:
    """Return, for each stream of a block, what it is before the first addition and what after the last."""
    left = block.cut.left
    first: dict[Node, Node] = {}  # of the last addition so far on a stream what the stream was before the first
    for node, other in left.items():
        earlier = _last_of(other, first)
        first[node] = other if earlier is None else first.pop(earlier)
    return [(before, after) for after, before in first.items()]


def _last_of(node: Node, sums: Collection[Node]) -> Node | None:
    """Return the one of ``sums`` that a stream comes from: itself, or through a norm behind it."""
    at: Node | None = node
    while at is not None and at not in sums:
        at = next(iter(at.all_input_nodes), None)
    return at


def _watchable(program: Program, ends: Sequence[tuple[Node, Node]]) -> tuple[Program, list[tuple[str, str, int]]]:
    """Return a copy of ``program`` and, by name, nodes of it with the values of ``ends``; and the features' dimension.

    Values are copied as soon as they are there: an operator in place may write over them later.
    """
    work = program.copy()
    rewriter, nodes = Rewriter(work, INFLUENCE), {node.name: node for node in work.nodes}
    found = []
    for before, after in ends:
        names = []
        for end in (before, after):
            node = nodes[end.name]
            following = node.next
            while following.op == "placeholder":
                following = following.next
            names.append(rewriter.call(torch.ops.aten.clone.default, node, origin=following).name)
        found.append((names[0], names[1], _features(before)))
    work.changed()
    return work, found


def _features(stream: Node) -> int:
    """Return the dimension of the features: 1 where a convolution reads values of the stream's shape, else the last."""
    shape = example_shape(stream.meta["val"])
    for node in stream.graph.nodes:
        if is_convolution(node) and example_shape(node.all_input_nodes[0].meta["val"]) == shape:
            return 1
    return -1
