"""Operators that regroup, reorder, split and join dimensions without computing."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..axes import Axis, Size, factors, leaves
from .base import Analysis, AxesRule, Dims, Resizer, Value, arg, out_sizes, resize_shape
from .elementwise import COMPUTED

DYNAMIC_CUT = "cut at a dynamic position"
OVERLAPPING = "cut into overlapping sections"


def reshape(an: Analysis, node: Node) -> Dims:
    """Row-major regrouping: the products of both sides are the same axis."""
    x = an.of(node.args[0])
    return _regroup(an, x, out_sizes(node))


def _regroup(an: Analysis, x: Dims, sizes: Sequence[Size]) -> Dims:
    if len(x) == len(sizes) and all(a.size == s for a, s in zip(x, sizes, strict=True)):
        return x
    out = tuple(an.leaf(size) for size in sizes)
    if any(type(s) is int and s == 0 for s in sizes):
        return out
    an.unify(an.product(x), an.product(out))
    return out


def view_dtype(an: Analysis, node: Node) -> Dims:
    """A view of the same bytes as another type."""
    an.freeze_all(an.of(node.args[0]), "its bytes are read as another type")
    return an.fresh(node.meta["val"], "its bytes are read as another type")


def flatten(an: Analysis, node: Node) -> Dims:
    """Several neighbouring dimensions become one: no literal depends on sizes."""
    return reshape(an, node)


def resize_unflatten(rz: Resizer, node: Node) -> None:
    """``unflatten(x, dim, sizes)`` writes the sizes of the new dimensions only."""
    out = rz.of(node)
    sizes = list(node.args[2])  # type: ignore[arg-type]
    start = arg(node, 1, "dim") % len(rz.of(node.args[0]))
    new = [
        size if size == -1 or not rz.changed(axis) else rz.size(axis) if isinstance(size, int) else -1
        for size, axis in zip(sizes, out[start : start + len(sizes)], strict=True)
    ]
    node.update_arg(2, new)


def reshape_as(an: Analysis, node: Node) -> Dims:
    """``x.reshape_as(y)``: also the dims of ``y``, since its shape is taken."""
    x, like = an.of(node.args[0]), an.of(node.args[1])
    an.unify(an.product(x), an.product(like))
    return like


def expand(an: Analysis, node: Node) -> Dims:
    """Stretched dimensions are new axes: all their indices are the same."""
    x = an.of(node.args[0])
    return _stretch(an, x, out_sizes(node))


def _stretch(an: Analysis, x: Dims, sizes: Sequence[Size]) -> Dims:
    shift = len(sizes) - len(x)
    out = []
    for i, size in enumerate(sizes):
        if i >= shift and x[i - shift].size == size:
            out.append(x[i - shift])
        else:
            axis = an.leaf(size, None if type(size) is int else COMPUTED)
            _copies(an, axis, x)
            out.append(axis)
    return tuple(out)


def _copies(an: Analysis, axis: Axis, x: Dims) -> None:
    """Note that ``axis`` repeats ``x``: query heads, if ``x`` holds keys or values and is not a mask."""
    if any(leaf.frozen is None for own in x for leaf in leaves(own)):
        an.role(axis, "head group")


def expand_as(an: Analysis, node: Node) -> Dims:
    """Like ``expand``, to the shape of another tensor, whose dims it therefore has."""
    x, like = an.of(node.args[0]), an.of(node.args[1])
    return an.broadcast([x, like], out_sizes(node))


def repeat(an: Analysis, node: Node) -> Dims:
    """``repeat`` and ``tile``: ``Product(times, x)`` per dimension."""
    x = an.of(node.args[0])
    times = node.args[1]
    assert isinstance(times, (list, tuple))
    sizes = out_sizes(node)
    times = [1] * (len(sizes) - len(times)) + list(times)
    shift = len(sizes) - len(x)
    out = []
    for i, (t, size) in enumerate(zip(times, sizes, strict=True)):
        axis = x[i - shift] if i >= shift else an.leaf(1)
        if t == 1:
            out.append(axis)
        elif axis.size == 1:
            out.append(an.leaf(size, None if type(size) is int else COMPUTED))
        elif isinstance(t, int):
            out.append(an.product([an.leaf(t, "repeated"), axis]))
        else:
            an.freeze(axis, "repeated a dynamic number of times")
            out.append(an.leaf(size, "repeated a dynamic number of times"))
    return tuple(out)


def resize_repeat(rz: Resizer, node: Node) -> None:
    """Repeats of a dimension of size 1 are sizes."""
    x, out = rz.of(node.args[0]), rz.of(node)
    times = list(node.args[1])  # type: ignore[arg-type]
    shift = len(out) - len(times)
    lead = len(out) - len(x)
    for i in range(len(times)):
        axis = out[shift + i]
        source = x[shift + i - lead] if shift + i >= lead else None
        if (source is None or source.size == 1) and rz.changed(axis):
            times[i] = rz.size(axis)
    node.update_arg(1, times)


def repeat_interleave(an: Analysis, node: Node) -> Dims:
    """Every index ``times`` times in a row: ``Product(x, times)``."""
    x = an.of(node.args[0])
    times, dim = arg(node, 1, "repeats"), arg(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        for n in node.all_input_nodes:
            an.freeze_all(an.of(n), "repeated by data")
        return an.fresh(node.meta["val"], "repeated by data")
    d = dim % len(x)
    inner = an.leaf(times)
    _copies(an, inner, x)
    return (*x[:d], an.product([x[d], inner]), *x[d + 1 :])


def resize_repeat_interleave(rz: Resizer, node: Node) -> None:
    """The number of repeats is the size of the inner axis; the size of the result may be written out too."""
    times, dim = arg(node, 1, "repeats"), arg(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return
    x, out = rz.of(node.args[0]), rz.of(node)
    d = dim % len(x)
    if not rz.changed(out[d]):
        return  # the size may be symbolic, which is no literal
    node.update_arg(1, _static_size(rz, out[d]) // _static_size(rz, x[d]))
    if node.kwargs.get("output_size") is not None:
        static = type(out[d].size) is int
        node.kwargs = {"output_size": rz.size(out[d])} if static else {}  # a computed size: let it be computed anew


def _static_size(rz: Resizer, axis: Axis) -> int:
    """Return the size after the removal without the factors that are dynamic."""
    return math.prod(rz.size(f) for f in factors(axis) if type(f.size) is int)


def transpose(an: Analysis, node: Node) -> Dims:
    """Swap two dimensions; ``t``, ``mT`` and relatives without arguments swap the last two."""
    x = list(an.of(node.args[0]))
    if len(x) < 2:
        return tuple(x)
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (-2, -1)
    x[a], x[b] = x[b], x[a]  # type: ignore[index]
    return tuple(x)


def numpy_t(an: Analysis, node: Node) -> Dims:
    """All dimensions reversed."""
    return an.of(node.args[0])[::-1]


def permute(an: Analysis, node: Node) -> Dims:
    """Reorder dimensions."""
    x = an.of(node.args[0])
    return tuple(x[d] for d in node.args[1])  # type: ignore[index, union-attr]


def movedim(an: Analysis, node: Node) -> Dims:
    """Move dimensions to new places."""
    x = an.of(node.args[0])
    source, target = (([v] if isinstance(v, int) else list(v)) for v in node.args[1:3])  # type: ignore[arg-type]
    order: list[int | None] = [None] * len(x)
    for s, t in zip(source, target, strict=True):
        order[t % len(x)] = s % len(x)
    rest = iter(i for i in range(len(x)) if i not in {s % len(x) for s in source})
    return tuple(x[next(rest) if i is None else i] for i in order)


def unsqueeze(an: Analysis, node: Node) -> Dims:
    """A new dimension of size 1."""
    x = list(an.of(node.args[0]))
    x.insert(node.args[1] % (len(x) + 1), an.leaf(1))  # type: ignore[operator]
    return tuple(x)


def squeeze(an: Analysis, node: Node) -> Dims:
    """Dimensions of size 1 vanish: those named, or all."""
    x = an.of(node.args[0])
    gone = _squeezed(x, arg(node, 1, "dim"))
    return tuple(axis for d, axis in enumerate(x) if d not in gone)


def _squeezed(x: Dims, dims: Any) -> list[int]:
    named = dims if isinstance(dims, (list, tuple)) else [dims]
    at = range(len(x)) if dims is None else [d % len(x) for d in named if x]
    return sorted(d for d in at if x[d].size == 1)


def resize_squeeze(rz: Resizer, node: Node) -> None:
    """A dimension of which one index stays must not vanish: what vanishes is named."""
    x = rz.of(node.args[0])
    if any(rz.size(axis) == 1 for axis in x if rz.changed(axis)):
        in_place = node.target._schema.name.endswith("_")  # type: ignore[union-attr]
        node.target = torch.ops.aten.squeeze_.dims if in_place else torch.ops.aten.squeeze.dims
        node.args, node.kwargs = (node.args[0], _squeezed(x, arg(node, 1, "dim"))), {}


def cat(an: Analysis, node: Node) -> Dims:
    """One after the other along one dimension; the others are tied. An empty vector is skipped."""
    tensors = node.args[0]
    assert isinstance(tensors, (list, tuple))
    rank = len(out_sizes(node))
    operands = [an.of(t) for t in tensors if len(an.of(t)) == rank]
    dim = arg(node, 1, "dim", 0) % rank
    sizes = out_sizes(node)
    if type(sizes[dim]) is int:
        joined = an.concat([dims[dim] for dims in operands])
    else:
        an.freeze_all([dims[dim] for dims in operands], "concatenated to a dynamic size")
        joined = an.leaf(sizes[dim])
    first = operands[0]
    for dims in operands[1:]:
        an.unify_all([*first[:dim], *first[dim + 1 :]], [*dims[:dim], *dims[dim + 1 :]])
    return (*first[:dim], joined, *first[dim + 1 :])


def stack(an: Analysis, node: Node) -> Dims:
    """A new dimension, one index an operand; the others are tied."""
    tensors = node.args[0]
    assert isinstance(tensors, (list, tuple))
    operands = [an.of(t) for t in tensors]
    for dims in operands[1:]:
        an.unify_all(operands[0], dims)
    out = list(operands[0])
    out.insert(arg(node, 1, "dim", 0) % (len(out) + 1), an.leaf(len(operands), "stacked"))
    return tuple(out)


def pad(an: Analysis, node: Node) -> Dims:
    """Constant padding: ``Concat(constant, x, constant)``; other modes read x by position."""
    x = an.of(node.args[0])
    widths = node.args[1]
    assert isinstance(widths, (list, tuple))
    mode = arg(node, 2, "mode", "constant") if node.target._schema.name == "aten::pad" else "constant"  # type: ignore[union-attr]
    sizes = out_sizes(node)
    out = list(x)
    for i in range(len(widths) // 2):
        d = len(x) - 1 - i
        before, after = widths[2 * i], widths[2 * i + 1]
        if before == 0 and after == 0:
            continue
        fits = all(isinstance(w, int) and w >= 0 for w in (before, after)) and type(sizes[d]) is int
        if mode == "constant" and fits:
            out[d] = an.concat([an.leaf(before, "padding"), x[d], an.leaf(after, "padding")])
        else:
            an.freeze(x[d], "padded by its own values" if mode != "constant" else "cropped by padding")
            out[d] = an.leaf(sizes[d], "padding")
    return tuple(out)


# ---------------------------------------------------------------------- cutting


def _bounds(axis: Axis, start: object, end: object) -> tuple[int, int] | None:
    """Return the section that ``x[start:end]`` takes as non-negative bounds, None if they are dynamic."""
    size = axis.size
    start = 0 if start is None else start
    end = sys.maxsize if end is None else end
    if type(size) is not int or not isinstance(start, int) or not isinstance(end, int):
        return None
    clip = [min(max(v + size if v < 0 else v, 0), size) for v in (start, end)]
    return clip[0], max(clip)


def slice_(an: Analysis, node: Node) -> Dims:
    """``x[start:end:step]``: a piece of a concat; a step is a factor of which one index stays."""
    x = an.of(node.args[0])
    d = arg(node, 1, "dim", 0) % len(x)
    axis, size, step = x[d], out_sizes(node)[d], arg(node, 4, "step", 1)
    bounds = _bounds(axis, arg(node, 2, "start"), arg(node, 3, "end"))
    if bounds is None:
        if axis.size == size and step == 1:
            return x
        an.freeze(axis, DYNAMIC_CUT)
        return (*x[:d], an.leaf(size, DYNAMIC_CUT), *x[d + 1 :])
    bounds = _whole_steps(*bounds, step)
    if bounds[1] > axis.size:
        an.freeze(axis, "a strided slice that does not divide it")
        return (*x[:d], an.leaf(size, "a strided slice that does not divide it"), *x[d + 1 :])
    section = an.section(axis, *bounds)
    assert section is not None
    if step != 1:
        outer = an.leaf(size)
        an.unify(section, an.product([outer, an.leaf(step, "strided slice")]))
        section = outer
    return (*x[:d], section, *x[d + 1 :])


def _whole_steps(start: int, stop: int, step: int) -> tuple[int, int]:
    """Widen a section to the blocks of ``step`` indices of which a strided slice takes one each.

    Blocks begin at multiples of ``step``, so that ``x[0::2]`` and ``x[1::2]`` take theirs from the same pairs.
    """
    first = start - start % step
    return first, first + -(-(stop - start) // step) * step


def resize_slice(rz: Resizer, node: Node) -> None:
    """Bounds count what stays before them."""
    x = rz.of(node.args[0])
    d = arg(node, 1, "dim", 0) % len(x)
    if not rz.changed(x[d]):
        return
    bounds = _bounds(x[d], arg(node, 2, "start"), arg(node, 3, "end"))
    if bounds is None:  # a dynamic size of which everything is taken
        return
    step = arg(node, 4, "step", 1)
    first, last = _whole_steps(*bounds, step)
    node.args = (node.args[0], d, rz.prefix(x[d], first) + bounds[0] % step, rz.prefix(x[d], last), *node.args[4:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k == "step"}


def narrow(an: Analysis, node: Node) -> Dims:
    """``x.narrow(dim, start, length)``."""
    x = an.of(node.args[0])
    d = arg(node, 1, "dim") % len(x)
    start, length = node.args[2], node.args[3]
    if type(x[d].size) is not int or not isinstance(start, int) or not isinstance(length, int):
        an.freeze(x[d], DYNAMIC_CUT)
        return (*x[:d], an.leaf(out_sizes(node)[d], DYNAMIC_CUT), *x[d + 1 :])
    start = _start(start, x[d].size)
    section = an.section(x[d], start, start + length)
    assert section is not None
    return (*x[:d], section, *x[d + 1 :])


def _start(start: int, size: int) -> int:
    return start + size if start < 0 else start


def resize_narrow(rz: Resizer, node: Node) -> None:
    """Start and length count what stays."""
    x = rz.of(node.args[0])
    d = arg(node, 1, "dim") % len(x)
    if rz.changed(x[d]):
        start, length = node.args[2], node.args[3]
        assert isinstance(start, int) and isinstance(length, int)
        start = _start(start, x[d].size)
        first = rz.prefix(x[d], start)
        node.args = (node.args[0], d, first, rz.prefix(x[d], start + length) - first)


def select(an: Analysis, node: Node) -> Dims:
    """``x[..., i, ...]``: that one index must stay."""
    x = an.of(node.args[0])
    d = arg(node, 1, "dim") % len(x)
    index = node.args[2]
    if type(x[d].size) is not int or not isinstance(index, int):
        an.freeze(x[d], DYNAMIC_CUT)
    elif x[d].size > 1:
        an.section(x[d], index % x[d].size, index % x[d].size + 1)
    return (*x[:d], *x[d + 1 :])


def resize_select(rz: Resizer, node: Node) -> None:
    """The index counts what stays before it."""
    x = rz.of(node.args[0])
    d = arg(node, 1, "dim") % len(x)
    if rz.changed(x[d]):
        node.update_arg(2, rz.prefix(x[d], node.args[2] % x[d].size))  # type: ignore[operator]


def unbind(an: Analysis, node: Node) -> Value:
    """Every index becomes an output, so all of them stay."""
    x = an.of(node.args[0])
    d = arg(node, 1, "dim", 0) % len(x)
    an.freeze(x[d], "every index of it is an output of its own")
    dims = (*x[:d], *x[d + 1 :])
    return tuple(dims for _ in node.meta["val"])


def split(an: Analysis, node: Node) -> Value:
    """``split``, ``chunk`` and ``tensor_split``: the pieces of a concat, by output number."""
    x = an.of(node.args[0])
    d = arg(node, 2, "dim", 0) % len(x)
    values = [an.fresh(value)[d].size for value in node.meta["val"]]
    by_data = len(node.all_input_nodes) > 1
    if by_data or type(x[d].size) is not int or not all(type(v) is int for v in values) or sum(values) != x[d].size:
        reason = OVERLAPPING if not by_data and type(x[d].size) is int else DYNAMIC_CUT
        an.freeze(x[d], reason)
        for n in node.all_input_nodes[1:]:
            an.freeze_all(an.of(n), reason)
        return tuple((*x[:d], an.leaf(v, reason), *x[d + 1 :]) for v in values)
    out, offset = [], 0
    for size in values:
        section = an.section(x[d], offset, offset + size)
        assert section is not None
        out.append((*x[:d], section, *x[d + 1 :]))
        offset += size
    return tuple(out)


def resize_split(rz: Resizer, node: Node) -> None:
    """Equal splits need not stay equal, so all become ``split_with_sizes``."""

    x = rz.of(node.args[0])
    d = arg(node, 2, "dim", 0) % len(x)
    if rz.changed(x[d]):
        node.target = torch.ops.aten.split_with_sizes.default
        sections: Any = rz.of(node)
        node.args = (node.args[0], [rz.size(dims[d]) for dims in sections], d)
        node.kwargs = {}


def glu(an: Analysis, node: Node) -> Dims:
    """The two halves of one dimension are tied: ``a * sigmoid(b)``."""
    x = an.of(node.args[0])
    d = arg(node, 1, "dim", -1) % len(x)
    both = an.cut(x[d], x[d].size // 2)
    if both is None:
        an.freeze(x[d], DYNAMIC_CUT)
        return (*x[:d], an.leaf(out_sizes(node)[d], DYNAMIC_CUT), *x[d + 1 :])
    an.unify(*both)
    return (*x[:d], both[0], *x[d + 1 :])


def diagonal(an: Analysis, node: Node) -> Dims:
    """A diagonal pairs two dimensions by position."""
    x = an.of(node.args[0])
    a, b = arg(node, 2, "dim1", 0) % len(x), arg(node, 3, "dim2", 1) % len(x)
    an.freeze_all((x[a], x[b]), "its diagonal is read")
    rest = [axis for i, axis in enumerate(x) if i not in (a, b)]
    return (*rest, an.leaf(out_sizes(node)[-1], "a diagonal"))


def triangle(an: Analysis, node: Node) -> Dims:
    """``triu`` and ``tril`` read positions of the last two dimensions."""
    x = an.of(node.args[0])
    an.freeze_all(x[-2:], "positions of a triangular mask")
    return x


def view_as_complex_or_real(an: Analysis, node: Node) -> Dims:
    """``view_as_complex`` drops, ``view_as_real`` adds a last dimension of 2."""
    x = an.of(node.args[0])
    size = out_sizes(node)
    if len(size) < len(x):
        an.freeze(x[-1], "real and imaginary part")
        return x[: len(size)]
    return (*x, *(an.leaf(s, "real and imaginary part") for s in size[len(x) :]))


RULES: dict[str, AxesRule] = {
    **{
        name: AxesRule(reshape, resize_shape(1, "size"))
        for name in ("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy")
    },
    "flatten": AxesRule(flatten),
    "ravel": AxesRule(flatten),
    "unflatten": AxesRule(reshape, resize_unflatten),
    "reshape_as": AxesRule(reshape_as),
    "view_as": AxesRule(reshape_as),
    "expand": AxesRule(expand, resize_shape(1, "size")),
    "broadcast_to": AxesRule(expand, resize_shape(1, "size")),
    "expand_as": AxesRule(expand_as),
    "repeat": AxesRule(repeat, resize_repeat),
    "tile": AxesRule(repeat, resize_repeat),
    "repeat_interleave": AxesRule(repeat_interleave, resize_repeat_interleave),
    **{
        name: AxesRule(transpose)
        for name in ("transpose", "t", "mT", "swapaxes", "swapdims", "adjoint", "mH", "matrix_H")
    },
    "numpy_T": AxesRule(numpy_t),
    "permute": AxesRule(permute),
    "movedim": AxesRule(movedim),
    "moveaxis": AxesRule(movedim),
    "unsqueeze": AxesRule(unsqueeze),
    "squeeze": AxesRule(squeeze, resize_squeeze),
    "cat": AxesRule(cat),
    "concat": AxesRule(cat),
    "concatenate": AxesRule(cat),
    "stack": AxesRule(stack),
    "pad": AxesRule(pad),
    "constant_pad_nd": AxesRule(pad),
    "slice": AxesRule(slice_, resize_slice),
    "narrow": AxesRule(narrow, resize_narrow),
    "select": AxesRule(select, resize_select),
    "unbind": AxesRule(unbind),
    **{
        name: AxesRule(split, resize_split)
        for name in (
            "split",
            "chunk",
            "split_with_sizes",
            "unsafe_split",
            "unsafe_chunk",
            "unsafe_split_with_sizes",
            "tensor_split",
        )
    },
    "glu": AxesRule(glu),
    "diagonal": AxesRule(diagonal),
    "triu": AxesRule(triangle),
    "tril": AxesRule(triangle),
    "view_as_complex": AxesRule(view_as_complex_or_real),
    "view_as_real_copy": AxesRule(view_as_complex_or_real),
    "view_as_real": AxesRule(view_as_complex_or_real),
}

RULES_BY_OVERLOAD: dict[str, AxesRule] = {
    "aten.view.dtype": AxesRule(view_dtype),
    "aten.view_copy.dtype": AxesRule(view_dtype),
}
