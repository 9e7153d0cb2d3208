"""Reductions. A plain sum is exact where what is summed is masked to zero; a mean is a statistic; an extremum freezes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from .base import Analysis, AxesRule, Dims, Value, arg, out_sizes

Mark = Callable[[Analysis, object, int], None]


def _reduced(node: Node, rank: int, index: int, default: int | None) -> list[int]:
    dims = arg(node, index, "dim", default)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims) or isinstance(dims, bool):
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if rank else []


def reducing(mark: Mark, dim_index: int = 1, default: int | None = None) -> Callable[[Analysis, Node], Value]:
    """Make the axes half of a reduction whose reduced axes are treated by ``mark``."""

    def axes(an: Analysis, node: Node) -> Value:
        if node.target._overloadname == "other":  # type: ignore[union-attr]  # the larger of two tensors
            return an.broadcast([an.of(n) for n in node.all_input_nodes], out_sizes(node))
        x = an.of(node.args[0])
        reduced = _reduced(node, len(x), dim_index, default)
        for d in reduced:
            if x[d].size != 1:
                mark(an, node.args[0], d)
        outputs = node.meta["val"]
        first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        if first.dim() == len(x):
            dims = tuple(an.leaf(1) if d in reduced else axis for d, axis in enumerate(x))
        else:
            dims = tuple(axis for d, axis in enumerate(x) if d not in reduced)
        return tuple(dims for _ in outputs) if isinstance(outputs, (tuple, list)) else dims

    return axes


def _statistic(an: Analysis, operand: object, dim: int) -> None:
    an.label(an.of(operand)[dim], "a mean is taken over it")


def _extremum(an: Analysis, operand: object, dim: int) -> None:
    an.freeze(an.of(operand)[dim], "an extremum, order or product is taken over it")


def _sum(an: Analysis, operand: object, dim: int) -> None:
    an.sum_over(an.of(operand)[dim], (operand, dim))


def vector_norm(an: Analysis, node: Node) -> Value:
    """A p-norm: a sum of powers for finite p above 0."""
    p = arg(node, 1, "ord" if "vector" in str(node.target) else "p", 2)
    finite = p is None or (isinstance(p, (int, float)) and 0 < p < float("inf"))
    return reducing(_sum if finite else _extremum, 2)(an, node)


def along(reason: str, dim_index: int = 1, default: int | tuple[int, ...] = -1) -> Callable[[Analysis, Node], Value]:
    """Make the axes half of an operator that keeps the shape but mixes positions along one dimension."""

    def axes(an: Analysis, node: Node) -> Value:
        x = an.of(node.args[0])
        dims = arg(node, dim_index, "dim", default)
        dims = dims if isinstance(dims, (list, tuple)) else () if dims is None else [dims]
        for d in dims or range(len(x)):  # none named: all
            if x:
                an.freeze(x[d % len(x)], reason)
        outputs = node.meta["val"]
        if not isinstance(outputs, (tuple, list)):
            return _same_or_fresh(an, x, outputs, reason)
        return tuple(_same_or_fresh(an, x, value, reason) for value in outputs)

    return axes


def _same_or_fresh(an: Analysis, x: Dims, value: torch.Tensor, reason: str) -> Dims:
    fresh = an.fresh(value, reason)
    return tuple(old if old.size == new.size else new for old, new in zip(x, fresh, strict=True))


def diff(an: Analysis, node: Node) -> Dims:
    """Differences of neighbours along one dimension."""
    x = an.of(node.args[0])
    dim = arg(node, 2, "dim", -1) % len(x)
    an.freeze(x[dim], "neighbours along it are subtracted")
    for extra in node.args[3:]:
        dims = an.of(extra)
        if dims:
            an.unify_all([a for i, a in enumerate(x) if i != dim], [a for i, a in enumerate(dims) if i != dim])
    return tuple(an.leaf(size, "neighbours") if i == dim else x[i] for i, size in enumerate(out_sizes(node)))


def cosine_similarity(an: Analysis, node: Node) -> Dims:
    """Both operands are summed over one dimension, alone and together: exact only if both were masked there."""
    x1, x2 = an.of(node.args[0]), an.of(node.args[1])
    dim = arg(node, 2, "dim", 1)
    rank = max(len(x1), len(x2))
    if len(x1) != len(x2):
        an.freeze_all((*x1, *x2), "cosine similarity of different ranks is not followed")
        return an.fresh(node.meta["val"], "cosine similarity of different ranks is not followed")
    both = an.broadcast([x1, x2], [a.size if a.size != 1 else b.size for a, b in zip(x1, x2, strict=True)])
    an.label(both[dim % rank], "norms are taken over it")
    return tuple(axis for i, axis in enumerate(both) if i != dim % rank)


_MEANS = "mean var std var_mean std_mean nanmean"
_EXTREMA = "amax amin max min prod any all argmax argmin logsumexp median aminmax nanmedian"
_ALONG = "cumsum cumprod sort argsort logcumsumexp cummax cummin"

RULES: dict[str, AxesRule] = {
    **{name: AxesRule(reducing(_statistic)) for name in _MEANS.split()},
    **{name: AxesRule(reducing(_extremum)) for name in _EXTREMA.split()},
    "mode": AxesRule(reducing(_extremum, default=-1)),
    **{name: AxesRule(along("positions along it are ordered or accumulated")) for name in _ALONG.split()},
    "topk": AxesRule(along("positions along it are ordered or accumulated", 2)),
    "sum": AxesRule(reducing(_sum)),
    "nansum": AxesRule(reducing(_sum)),
    "linalg_vector_norm": AxesRule(vector_norm),
    "norm": AxesRule(vector_norm),
    "diff": AxesRule(diff),
    "cosine_similarity": AxesRule(cosine_similarity),
    "flip": AxesRule(along("its order is reversed")),
    "roll": AxesRule(along("its positions are rolled", 2, ())),
    "fft_fft": AxesRule(along("a Fourier transform runs along it", 2)),
    "fft_ifft": AxesRule(along("a Fourier transform runs along it", 2)),
    "fft_rfft": AxesRule(along("a Fourier transform runs along it", 2)),
    "fft_irfft": AxesRule(along("a Fourier transform runs along it", 2)),
    **{
        f"fft_{inverse}{real}fft{rank}": AxesRule(along("a Fourier transform runs along it", 2, dims))
        for inverse in ("", "i")
        for real in ("", "r")
        for rank, dims in (("2", (-2, -1)), ("n", ()))
    },
}
