"""Reading and writing by index. What is indexed by data freezes; the other dimensions pass."""

from __future__ import annotations

import torch
from torch.fx import Node

from .base import Analysis, AxesRule, Dims, Value, arg, frozen, out_sizes

BY_DATA = "indexed by data"


def embedding(an: Analysis, node: Node) -> Dims:
    """``weight[vocabulary, width]`` looked up by an integer tensor."""
    weight, index = an.of(node.args[0]), an.of(node.args[1])
    an.freeze(weight[0], "vocabulary")
    return (*index, *weight[1:])


def embedding_bag(an: Analysis, node: Node) -> Value:
    """``weight[vocabulary, width]`` looked up, and added up or averaged in bags; the other results are bookkeeping."""
    weight, outputs = an.of(node.args[0]), node.meta["val"]
    an.freeze(weight[0], "vocabulary")
    for source in node.all_input_nodes:
        if source is not node.args[0]:
            an.freeze_all(an.of(source), BY_DATA)
    if arg(node, 4, "mode", 0) == 2:
        an.freeze(weight[1], "an extremum is taken, and where it is")
    bags = an.fresh(outputs[0], BY_DATA)[0]
    return ((bags, weight[1]), *(an.fresh(value, BY_DATA) for value in outputs[1:]))


def embedding_renorm(an: Analysis, node: Node) -> Dims:
    """Rows of the table whose norm is above ``max_norm`` are rewritten in place, whenever the model runs."""
    weight = an.of(node.args[0])
    an.freeze_all((*weight, *an.of(node.args[1])), "an embedding with max_norm rewrites its rows by their norm")
    return weight


def index(an: Analysis, node: Node) -> Dims:
    """``x[i, :, j]``: indexed dimensions freeze; the index's own dims come where torch puts them."""
    x = an.of(node.args[0])
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    sizes = out_sizes(node)
    at = [d for d, i in enumerate(indices) if isinstance(i, Node)]
    if any(_is_mask(i) for i in indices):
        return _boolean(an, node, x)
    an.freeze_all([x[d] for d in at], BY_DATA)
    kept = [x[d] for d in range(len(x)) if d not in at]
    rank = len(sizes) - len(kept)
    contiguous = at == list(range(at[0], at[0] + len(at)))
    place = at[0] if contiguous else 0
    own = an.broadcast([an.of(indices[d]) for d in at], sizes[place : place + rank])
    return (*kept[:place], *own, *kept[place:])


def _is_mask(index: object) -> bool:
    return isinstance(index, Node) and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _boolean(an: Analysis, node: Node, x: Dims) -> Dims:
    an.freeze_all(x, BY_DATA)
    for n in node.all_input_nodes:
        an.freeze_all(an.of(n), BY_DATA)
    return an.fresh(node.meta["val"], BY_DATA)


def index_put(an: Analysis, node: Node) -> Dims:
    """Writes by index: indexed dimensions freeze, and the values' trailing dims are the destination's."""
    x = an.of(node.args[0])
    indices, values = node.args[1], an.of(node.args[2])
    assert isinstance(indices, (list, tuple))
    at = [d for d, i in enumerate(indices) if isinstance(i, Node)]
    for i in indices:
        an.freeze_all(an.of(i), BY_DATA)
    simple = at == list(range(len(at)))
    covered = sum(len(an.of(indices[d])) if _is_mask(indices[d]) else 1 for d in at)  # a mask covers all its dimensions
    trailing = x[covered:] if simple else x
    an.freeze_all(x[:covered], BY_DATA)
    if simple:
        rank = min(len(trailing), len(values))
        an.broadcast(
            [trailing[len(trailing) - rank :], values[len(values) - rank :]],
            [a.size for a in trailing[len(trailing) - rank :]],
        )
        an.freeze_all(values[: len(values) - rank], BY_DATA)
    else:
        an.freeze_all((*trailing, *values), BY_DATA)
    return x


def index_select(an: Analysis, node: Node) -> Dims:
    """One dimension is read by an index vector."""
    x, own = an.of(node.args[0]), an.of(node.args[2])
    d = arg(node, 1, "dim") % len(x)
    an.freeze(x[d], BY_DATA)
    return (*x[:d], *(own or (an.leaf(1),)), *x[d + 1 :])


def index_add(an: Analysis, node: Node) -> Dims:
    """``index_add``, ``index_copy``, ``index_fill``: slices written along one dimension; the others are tied."""
    x, own, source = an.of(node.args[0]), an.of(node.args[2]), an.of(node.args[3])
    d = arg(node, 1, "dim") % len(x)
    an.freeze_all((x[d], *own, *source[d : d + 1]), BY_DATA)
    if source:
        an.unify_all([*x[:d], *x[d + 1 :]], [*source[:d], *source[d + 1 :]])
    return x


def gather(an: Analysis, node: Node) -> Dims:
    """Element-wise lookup along one dimension; the index has the result's shape."""
    x, own = an.of(node.args[0]), an.of(node.args[2])
    d = arg(node, 1, "dim") % len(x)
    an.freeze(x[d], BY_DATA)
    _tie_or_freeze(an, x, own, d)
    return own


def scatter(an: Analysis, node: Node) -> Dims:
    """Element-wise write along one dimension, of which nothing may stay unwritten."""
    x, own, source = an.of(node.args[0]), an.of(node.args[2]), an.of(node.args[3])
    d = arg(node, 1, "dim") % len(x)
    an.freeze_all((x[d], own[d], *source[d : d + 1]), BY_DATA)
    _tie_or_freeze(an, x, own, d)
    if source:
        _tie_or_freeze(an, source, own, -1)
    return x


def _tie_or_freeze(an: Analysis, x: Dims, own: Dims, skip: int) -> None:
    for i, (a, b) in enumerate(zip(x, own, strict=True)):
        if i == skip:
            continue
        if a.size == b.size:
            an.unify(a, b)
        else:
            an.freeze_all((a, b), BY_DATA)


def take_along(an: Analysis, node: Node) -> Dims:
    """Lookup along one dimension with broadcasting."""
    x, own = an.of(node.args[0]), an.of(node.args[1])
    dim = arg(node, 2, "dim")
    if dim is None:
        an.freeze_all((*x, *own), BY_DATA)
        return an.fresh(node.meta["val"], BY_DATA)
    d = dim % len(x)
    an.freeze(x[d], BY_DATA)
    without = [tuple(a for i, a in enumerate(dims) if i != d) for dims in (x, own)]
    sizes = list(out_sizes(node))
    size = sizes.pop(d)
    out = list(an.broadcast(without, sizes))
    out.insert(d, own[d] if own[d].size == size else an.leaf(size, BY_DATA))
    return tuple(out)


def section_scatter(an: Analysis, node: Node) -> Dims:
    """``slice_scatter`` and ``select_scatter`` (functional forms of writes into views)."""
    x, source = an.of(node.args[0]), an.of(node.args[1])
    an.freeze_all((*x, *source), "written by position")
    return x


RULES: dict[str, AxesRule] = {
    # The values of the source go where the mask is true, one after the other, whatever dimension that is in.
    "masked_scatter": AxesRule(frozen("written where a mask is true")),
    "embedding": AxesRule(embedding),
    "embedding_bag": AxesRule(embedding_bag),
    "_embedding_bag": AxesRule(embedding_bag),
    "embedding_renorm": AxesRule(embedding_renorm),
    "index": AxesRule(index),
    "_unsafe_index": AxesRule(index),
    "index_put": AxesRule(index_put),
    "_unsafe_index_put": AxesRule(index_put),
    "index_select": AxesRule(index_select),
    "index_add": AxesRule(index_add),
    "index_copy": AxesRule(index_add),
    "index_fill": AxesRule(index_add),
    "gather": AxesRule(gather),
    "scatter": AxesRule(scatter),
    "scatter_add": AxesRule(scatter),
    "scatter_reduce": AxesRule(scatter),
    "take_along_dim": AxesRule(take_along),
    "slice_scatter": AxesRule(section_scatter),
    "select_scatter": AxesRule(section_scatter),
}
