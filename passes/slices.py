"""Slices: what of a parameter goes with each index of a coupling group, summed or as rows.

A slice of a member is everything of its tensor that is removed with one index of the group: row ``i`` of a linear
weight, or all 49 columns of a flattened 7x7 channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.groups import Member

# Elements of a block of `power_sums`: 1 MiB of float32.
BLOCK = 1 << 18


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in at least float32: squares of small half-precision values vanish."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def slice_sums(elements: Tensor, member: Member) -> Tensor:
    """Sum element scores over the slice of each index.

    Args:
        elements: Same shape as the member's tensor.
        member: Says which indices of which dimension belong to index ``i``.

    Returns:
        ``[size of the axis]``, at least float32.
    """
    others = [d for d in range(elements.dim()) if d != member.dim]
    return gathered(wide(elements).sum(others) if others else wide(elements), member)


def slice_rows(elements: Tensor, member: Member) -> Tensor:
    """Return the slice of index ``i`` as row ``i``: ``[size of the axis, rest]``."""
    index = torch.from_numpy(member.positions()).to(elements.device)
    return elements.movedim(member.dim, 0)[index].flatten(1)


def power_sums(tensor: Tensor, p: int) -> tuple[Tensor, ...]:
    """Sum ``|w| ** p`` over all dimensions but one, for each dimension, in one pass over the tensor.

    The pass goes by blocks that stay in cache: a temporary of the size of a large weight costs more than the sums.

    Returns:
        One vector a dimension, as long as the dimension, at least float32.
    """
    shape = tensor.shape
    rows = tensor.detach().reshape(shape[0], -1)
    dtype = torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
    first = torch.empty(shape[0], dtype=dtype, device=tensor.device)
    rest = torch.zeros(rows.shape[1], dtype=dtype, device=tensor.device)
    step = max(1, BLOCK // max(1, rows.shape[1]))
    for start in range(0, shape[0], step):
        block = rows[start : start + step]
        block = block.to(dtype) if p == 2 and not block.is_complex() else block.abs().to(dtype)
        block = block if p == 1 else block * block if p == 2 else block**p
        first[start : start + step] = block.sum(1)
        rest += block.sum(0)
    rest = rest.view(shape[1:])
    others = ([e for e in range(rest.dim()) if e != d] for d in range(rest.dim()))
    return first, *(rest.sum(dims) if dims else rest for dims in others)


def gathered(line: Tensor, member: Member) -> Tensor:
    """Sum the entries of a dimension that belong to each index of the member's axis: ``[size of the axis]``."""
    index = torch.from_numpy(member.positions()).to(line.device)
    return line[index].sum(1)
