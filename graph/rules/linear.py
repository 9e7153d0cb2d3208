"""Products of matrices: linear layers, matmul, einsum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from ..axes import Axis
from .base import Analysis, AxesRule, Dims, arg, frozen, out_sizes


def linear(an: Analysis, node: Node) -> Dims:
    """``x[..., i] weight[o, i] bias[o]``."""
    x, weight = an.of(arg(node, 0, "input")), an.of(arg(node, 1, "weight"))
    an.unify(x[-1], weight[-1])
    _sum_over(an, (node.args[0], -1), (node.args[1], -1))
    if len(weight) == 1:
        return x[:-1]
    bias = an.of(arg(node, 2, "bias"))
    if bias:
        an.unify(weight[0], bias[0])
    return (*x[:-1], weight[0])


def matmul(an: Analysis, node: Node) -> Dims:
    """``[..., n, k] @ [..., k, m]`` with broadcast batch dimensions; vectors as in ``torch.matmul``."""
    a, b = an.of(node.args[0]), an.of(node.args[1])
    return _matmul(an, node, a, b)


def _matmul(an: Analysis, node: Node, a: Dims, b: Dims) -> Dims:
    an.unify(a[-1], b[-2:][0])
    _sum_over(an, (node.args[0], -1), (node.args[1], -2 if len(b) > 1 else -1))
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    rank = len(out_sizes(node)) - len(rows) - len(columns)
    batch = an.broadcast([a[:-2], b[:-2]], out_sizes(node)[:rank])
    if not (an.is_weight(node.args[0]) or an.is_weight(node.args[1])):
        _attention_roles(an, a, b)
    return (*batch, *rows, *columns)


def addmm(an: Analysis, node: Node) -> Dims:
    """``bias + a @ b`` and its batched form."""
    bias, a, b = (an.of(n) for n in node.args[:3])
    an.unify(a[-1], b[-2])
    _sum_over(an, (node.args[1], -1), (node.args[2], -2))
    sizes = out_sizes(node)
    out = (*an.broadcast([a[:-2], b[:-2]], sizes[:-2]), a[-2], b[-1])
    if len(a) > 2 and not an.is_weight(node.args[2]):
        _attention_roles(an, a, b)
    return an.broadcast([out, bias], sizes)


def _attention_roles(an: Analysis, a: Dims, b: Dims) -> None:
    """A product of activations is half of an attention if a softmax runs over its keys: ``q k`` or ``weights v``."""
    if len(a) < 2 or len(b) < 2:
        return
    inner, keys = a[-1], b[-1]
    an.role(inner, "head dim", keys)
    an.role(keys, "value dim", inner)
    for axis in (*a[:-2], *b[:-2]):
        an.role(axis, "head", keys, inner)


def outer(an: Analysis, node: Node) -> Dims:
    """``a[n] b[m] -> [n, m]``."""
    return (an.of(node.args[0])[0], an.of(node.args[1])[0])


def bilinear(an: Analysis, node: Node) -> Dims:
    """``x1[..., i] weight[o, i, j] x2[..., j]``."""
    x1, x2, weight = (an.of(n) for n in node.args[:3])
    an.unify(x1[-1], weight[1])
    an.unify(x2[-1], weight[2])
    _sum_over(an, (node.args[2], 1), (node.args[0], -1))
    _sum_over(an, (node.args[2], 2), (node.args[1], -1))
    bias = an.of(arg(node, 3, "bias"))
    if bias:
        an.unify(weight[0], bias[0])
    lead = an.broadcast([x1[:-1], x2[:-1]], out_sizes(node)[:-1])
    return (*lead, weight[0])


def einsum(an: Analysis, node: Node) -> Dims:
    """Equal letters are equal axes; a letter that does not come out is summed over."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    terms, output = einsum_terms(equation, [len(an.of(operand)) for operand in operands])
    letters: dict[str, Axis] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, axis in zip(term, an.of(operand), strict=True):
            known = letters.get(letter)
            if known is None or (known.size == 1 and axis.size != 1):
                letters[letter] = axis
            elif axis.size == known.size:
                an.unify(known, axis)
    activations = not any(an.is_weight(operand) for operand in operands)
    for letter, axis in letters.items():
        holders = [
            (operand, term.index(letter))
            for term, operand in zip(terms, operands, strict=True)
            if letter in term and an.of(operand)[term.index(letter)].size == axis.size
        ]
        if letter not in output:
            _sum_over(an, *holders)
        if activations and len(operands) == 2:
            _einsum_role(an, letter, letters, terms, output)
    return tuple(letters[letter] for letter in output)


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Return the letters of each operand's dimensions and of the result's.

    Dimensions of an ellipsis get letters of their own, the same for those that broadcast. Without ``->`` come out the
    ellipsis, then the letters that occur once, in order.

    Args:
        equation: As ``torch.einsum`` takes it.
        ranks: Number of dimensions of each operand.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms, widest = [], ""
    for term, rank in zip(inputs.split(","), ranks, strict=True):
        extra = rank - len(term.replace("...", ""))
        stretch = "".join(chr(0x2460 + i) for i in reversed(range(extra)))
        terms.append(term.replace("...", stretch))
        widest = max(widest, stretch, key=len)
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." + "".join(sorted(letter for letter in letters if letters.count(letter) == 1))
    return terms, output.replace("...", widest)


def _einsum_role(an: Analysis, letter: str, letters: dict[str, Axis], terms: list[str], output: str) -> None:
    """As `_attention_roles`, told by which operand has the letter and whether it comes out."""
    summed = [letters[other] for other in letters if other not in output]
    free = [letters[other] for other in output if sum(other in term for term in terms) == 1]
    if letter not in output:
        role, witnesses = "head dim", free
    elif all(letter in term for term in terms):
        role, witnesses = "head", [*free, *summed]
    else:
        role, witnesses = "value dim", summed
    if witnesses:  # without one, it would be an attention's whatever comes of it
        an.role(letters[letter], role, *witnesses)


def inner(an: Analysis, node: Node) -> Dims:
    """``a[..., k] b[..., k]``: every row with every row; a number only scales."""
    a, b = an.of(node.args[0]), an.of(node.args[1])
    if not a or not b:
        return a or b
    an.unify(a[-1], b[-1])
    _sum_over(an, (node.args[0], -1), (node.args[1], -1))
    return (*a[:-1], *b[:-1])


def tensordot(an: Analysis, node: Node) -> Dims:
    """Dimensions of both that are summed in pairs; the rest of the first comes out before the rest of the second."""
    a, b = an.of(node.args[0]), an.of(node.args[1])
    left, right = ([d % len(x) for d in dims] for x, dims in ((a, node.args[2]), (b, node.args[3])))  # type: ignore[union-attr, operator]
    for i, j in zip(left, right, strict=True):
        if a[i].size == b[j].size:
            an.unify(a[i], b[j])
            _sum_over(an, (node.args[0], i), (node.args[1], j))
        else:  # one of them has size 1 and stretches
            for operand, dims, d in ((node.args[0], a, i), (node.args[1], b, j)):
                if dims[d].size != 1:
                    _sum_over(an, (operand, d))
    kept = [axis for d, axis in enumerate(a) if d not in left]
    return (*kept, *(axis for d, axis in enumerate(b) if d not in right))


def grouped_mm(an: Analysis, node: Node) -> Dims:
    """Experts: rows ``x[tokens, in]``, sorted by expert, times ``weight[experts, in, out]``; offsets say which is whose."""
    x, weight, offsets = (an.of(n) for n in node.args[:3])
    if len(x) != 2 or len(weight) != 3:
        an.freeze_all((*x, *weight), "a grouped matrix product of other ranks is not followed")
        return an.fresh(node.meta["val"], "a grouped matrix product of other ranks is not followed")
    an.unify(x[1], weight[1])
    an.freeze_all((x[0], weight[0], *offsets), "rows are routed to experts by data")
    if node.target is torch.ops.aten._grouped_mm.default:
        # The kernel wants rows that start at multiples of 16 bytes.
        value = node.args[1].meta["val"]  # type: ignore[union-attr] (FX arguments have any type)
        for axis in (x[1], weight[2] if value.stride(-1) == 1 else weight[1]):
            an.divisible(axis, 16 // value.element_size())
    _sum_over(an, (node.args[0], 1), (node.args[1], 1))
    return (x[0], weight[2])


def _sum_over(an: Analysis, *places: tuple[object, int]) -> None:
    """A contraction with a parameter is exact: the parameter's slice goes. Anything else needs a zero."""
    if not any(an.is_masked(operand) for operand, _ in places):
        operand, dim = places[0]
        an.sum_over(an.of(operand)[dim], *places)


RULES: dict[str, AxesRule] = {
    "linear": AxesRule(linear),
    "matmul": AxesRule(matmul),
    "mm": AxesRule(matmul),
    "bmm": AxesRule(matmul),
    "mv": AxesRule(matmul),
    "dot": AxesRule(matmul),
    "vdot": AxesRule(matmul),
    "addmm": AxesRule(addmm),
    "baddbmm": AxesRule(addmm),
    "outer": AxesRule(outer),
    "ger": AxesRule(outer),
    "bilinear": AxesRule(bilinear),
    "einsum": AxesRule(einsum),
    "inner": AxesRule(inner),
    "tensordot": AxesRule(tensordot),
    "cdist": AxesRule(frozen("distances of all pairs (cdist) are not followed")),
    "pairwise_distance": AxesRule(frozen("a pairwise distance is not followed")),
    "kron": AxesRule(frozen("a Kronecker product (kron) is not followed")),
    "_grouped_mm": AxesRule(grouped_mm),
}

# Operators of other libraries, by their full name.
FOREIGN: dict[str, AxesRule] = {"transformers::grouped_mm_fallback": AxesRule(grouped_mm)}
