"""Clean-up before the ONNX export: calls that the exporter or ONNX Runtime gets wrong, or slowly, become calls that work.

Each rule names one operator, says for which calls it is needed, and gives a function with the operator's arguments
and meaning, written with operators that export. A call that needs the rule gets the function as its target; the
re-export that follows traces through it. What each rule repairs was seen with torch 2.13 and ONNX Runtime 1.32:

- ``squeeze`` of a dimension that is not 1: ONNX Runtime refuses the file, ONNX's ``Squeeze`` has no such no-op.
- ``scaled_dot_product_attention`` on other than 4 dimensions: the exporter has no translation. With a boolean mask,
  rows that attend to nothing give 0 in PyTorch and an average in ONNX. A mask that is broadcast along the queries:
  the ``Attention`` kernel refuses it. One key for all heads, without ``enable_gqa``: the exporter fails.
- ``chunk`` and ``split`` along a dynamic dimension: the exporter's optimiser fails.
- ``sort(stable=True)``, ``isin``, ``cdist``, ``remainder`` and ``pow`` by a dynamic size: no translation. (ONNX's
  ``TopK`` keeps the order of equal values, so its sort is stable.)
- ``lstm`` with projections: ONNX has none, and the exporter leaves them out.
- ``topk(sorted=False)``: the CUDA provider needs sorted results.
- ``einsum`` that only permutes: optimisers know a transpose, and take ``Einsum`` as it is.
- ``chunk`` and ``split``, with sizes or not, of which at most half of the pieces is read, as of modulations in a program that
  reuses a branch: ``Split`` copies all pieces.

Besides, every ``view`` becomes a ``reshape`` and every attention gives contiguous memory: the strides of a result are
not always the same when a graph is traced again, and a view that was possible then is not any more.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from .flat import call_arguments
from .onnx_recurrent import has_projection, projected_lstm

aten = torch.ops.aten


@dataclass(frozen=True)
class Substitute:
    """What replaces the calls of one operator.

    Attributes:
        needed: Whether a call, given as the recorded values of its arguments by name, has to be replaced.
        function: Takes the operator's arguments and returns what it returns.
    """

    needed: Callable[[Mapping[str, Any]], bool]
    function: Callable[..., Any]


def clean_up(gm: GraphModule) -> dict[str, int]:
    """Replace, in place, the calls that do not export; return how many by operator."""
    counts: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        rule = SUBSTITUTES.get(node.target)
        if rule is not None and (rule.needed(_recorded_arguments(node)) or _is_half_read(node)):
            counts[str(node.target)] += 1
            node.target = rule.function
        else:
            node.target = ANY_LAYOUT.get(node.target, node.target)
    gm.recompile()
    return dict(counts)


def _recorded_arguments(node: Node) -> dict[str, Any]:
    return {
        name: value.meta["val"] if isinstance(value, Node) else value for name, value in call_arguments(node).items()
    }


def _is_half_read(node: Node) -> bool:
    """Whether some, and at most half, of the pieces of a split are read."""
    if node.target not in SPLITS or any(user.target is not operator.getitem for user in node.users):
        return False
    pieces = node.meta["val"]
    empty = any(isinstance(size, int) and size == 0 for size in pieces[0].shape)
    return 0 < 2 * len(node.users) <= len(pieces) and not empty


def _is_one(size: int | torch.SymInt) -> bool:
    # torch.export takes a dynamic size for 2 or more.
    return isinstance(size, int) and size == 1


def _is_dynamic(size: object) -> bool:
    return isinstance(size, torch.SymInt)


def squeeze_nothing(self: Tensor, dim: int) -> Tensor:
    """``squeeze`` of a dimension whose size is not 1."""
    return self


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` on 4 dimensions, with a mask that has one row a query; contiguous."""
    if not enable_gqa:
        query, key, value = _broadcast(query, key, value)
    lead = query.shape[:-2]
    if query.dim() != 4:
        query, key, value = (_four_dimensional(t, lead) for t in (query, key, value))
    mask = attn_mask
    if mask is not None and len(lead) != 2 and mask.dim() > 2:
        mask = _four_dimensional(mask, lead)
    rows = mask
    if mask is not None and _is_one(mask.shape[-2]):
        rows = mask.expand(*mask.shape[:-2], query.shape[-2], mask.shape[-1])
    out = aten.scaled_dot_product_attention.default(
        query, key, value, rows, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if mask is not None and mask.dtype is torch.bool:
        out = torch.where(mask.any(-1, keepdim=True), out, torch.zeros((), dtype=out.dtype, device=out.device))
    out = out.clone(memory_format=torch.contiguous_format)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _broadcast(*tensors: Tensor) -> list[Tensor]:
    """Expand leading dimensions of size 1 to those of the others."""
    if len({tensor.dim() for tensor in tensors}) > 1:
        return list(tensors)
    sizes = zip(*(tensor.shape[:-2] for tensor in tensors), strict=True)
    lead = [next((size for size in dim if not _is_one(size)), 1) for dim in sizes]
    return [tensor.expand(*lead, *tensor.shape[-2:]) if _is_broadcast(tensor, lead) else tensor for tensor in tensors]


def _is_broadcast(tensor: Tensor, lead: Sequence[int | torch.SymInt]) -> bool:
    return any(_is_one(size) and not _is_one(want) for size, want in zip(tensor.shape, lead, strict=False))


def _four_dimensional(tensor: Tensor, lead: torch.Size) -> Tensor:
    # [*lead, rows, columns] -> [lead[0], product of lead[1:], rows, columns]; 2 or 3 dimensions get ones in front.
    if len(lead) < 2:
        return tensor.reshape(*(1,) * (4 - tensor.dim()), *tensor.shape)
    return tensor.expand(*lead, *tensor.shape[-2:]).flatten(1, -3)


def split_by_slices(self: Tensor, split_size: int, dim: int = 0) -> list[Tensor]:
    """``split`` into pieces of one size, the last one smaller if need be."""
    size = self.shape[dim]
    count = int((size + split_size - 1) // split_size)
    return [
        aten.slice.Tensor(self, dim, i * split_size, (i + 1) * split_size if i + 1 < count else None)
        for i in range(count)
    ]


def split_sizes_by_slices(self: Tensor, split_sizes: list[int], dim: int = 0) -> list[Tensor]:
    """``split_with_sizes``."""
    pieces, start = [], 0
    for size in split_sizes:
        pieces.append(aten.slice.Tensor(self, dim, start, start + size))
        start = start + size
    return pieces


def chunk_by_slices(self: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """``chunk``."""
    return split_by_slices(self, (self.shape[dim] + chunks - 1) // chunks, dim)


def permutation(equation: str, tensors: Sequence[Tensor], *, path: Sequence[int] | None = None) -> Tensor:
    """``einsum`` of one tensor that only permutes its dimensions."""
    read, _, written = equation.replace(" ", "").partition("->")
    return tensors[0].permute([read.index(letter) for letter in written])


def stable_sort(self: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """``sort`` that keeps the order of equal values."""
    return aten.sort.default(self, dim, descending)


def sorted_topk(
    self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """``topk`` in order."""
    return aten.topk.default(self, k, dim, largest, True)


def is_in(elements: Tensor, test_elements: Tensor, *, assume_unique: bool = False, invert: bool = False) -> Tensor:
    """``isin`` by comparing with every test element: memory is the product of both sizes."""
    found = (elements.unsqueeze(-1) == test_elements.flatten()).any(-1)
    return ~found if invert else found


def distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """``cdist`` by its definition, with memory for every pair of rows and every column."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def remainder_by_size(self: Tensor, other: int) -> Tensor:
    """``remainder`` by a size."""
    return aten.remainder.Tensor(self, torch.scalar_tensor(other, dtype=self.dtype, device=self.device))


def power_of_size(self: Tensor, exponent: int) -> Tensor:
    """``pow`` with a size as exponent."""
    return aten.pow.Tensor_Tensor(self, torch.scalar_tensor(exponent, dtype=self.dtype, device=self.device))


def _squeezes_nothing(call: Mapping[str, Any]) -> bool:
    return call["self"].dim() > 0 and not _is_one(call["self"].shape[call["dim"]])


def _unusual_attention(call: Mapping[str, Any]) -> bool:
    mask = call["attn_mask"]
    rows_differ = mask is not None and _is_one(mask.shape[-2]) and not _is_one(call["query"].shape[-2])
    if call["query"].dim() != 4 or rows_differ or (mask is not None and mask.dtype is torch.bool):
        return True
    lead, others = call["query"].shape[:-2], (call["key"], call["value"])
    return not call["enable_gqa"] and any(
        _is_broadcast(x, lead) or _is_broadcast(call["query"], x.shape[:-2]) for x in others
    )


def _splits_dynamically(call: Mapping[str, Any]) -> bool:
    return _is_dynamic(call["self"].shape[call["dim"]])


def _only_permutes(call: Mapping[str, Any]) -> bool:
    read, _, written = call["equation"].replace(" ", "").partition("->")
    return read.isalpha() and sorted(read) == sorted(written) and len(set(read)) == len(read)


SPLITS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})

SUBSTITUTES: Mapping[OpOverload, Substitute] = MappingProxyType(
    {
        aten.squeeze.dim: Substitute(_squeezes_nothing, squeeze_nothing),
        aten.squeeze_.dim: Substitute(_squeezes_nothing, squeeze_nothing),
        aten.scaled_dot_product_attention.default: Substitute(_unusual_attention, attention),
        aten.chunk.default: Substitute(_splits_dynamically, chunk_by_slices),
        aten.split.Tensor: Substitute(_splits_dynamically, split_by_slices),
        aten.split_with_sizes.default: Substitute(_splits_dynamically, split_sizes_by_slices),
        aten.einsum.default: Substitute(_only_permutes, permutation),
        aten.sort.stable: Substitute(lambda call: True, stable_sort),
        aten.lstm.input: Substitute(has_projection, projected_lstm),
        aten.topk.default: Substitute(lambda call: not call["sorted"], sorted_topk),
        aten.isin.Tensor_Tensor: Substitute(lambda call: True, is_in),
        aten.cdist.default: Substitute(lambda call: True, distances),
        aten.remainder.Scalar: Substitute(lambda call: _is_dynamic(call["other"]), remainder_by_size),
        aten.pow.Tensor_Scalar: Substitute(lambda call: _is_dynamic(call["exponent"]), power_of_size),
    }
)

# Replacements that change nothing but the memory layout: not counted.
ANY_LAYOUT: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType(
    {aten.view.default: aten.reshape.default, aten.scaled_dot_product_attention.default: attention}
)
