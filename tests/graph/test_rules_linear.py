"""Matrix products, by the law of ``rule_oracle``. Operands that are parameters stand for weights."""

from __future__ import annotations

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case
from torch import Tensor

table = Table()


@table("linear")
def linear_layer(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    width = d.size()
    weight = d.weight(width, x.shape[-1])
    lead = "f" * (x.dim() - 1)
    if d.int(0, 3) == 0:
        return call(aten.linear.default, x, d.weight(x.shape[-1]), expect=f"{lead}f f")
    bias = (d.weight(width),) if d.flag() else ()
    return call(aten.linear.default, x, weight, *bias, expect=f"{lead}f ff" + " f" * len(bias))


@table("linear")
def linear_with_a_computed_weight_is_a_sum(d: Draw) -> Call:
    x, width = d.tensor(*d.shape(1, 3)), d.size()
    lead = "f" * (x.dim() - 1)
    weight = d.tensor(x.shape[-1]) if d.int(0, 2) == 0 else d.tensor(width, x.shape[-1])
    return call(aten.linear.default, x, weight, expect=f"{lead}s {'f' * (weight.dim() - 1)}s")


def operand(d: Draw, weight: bool, *shape: int) -> Tensor:
    return d.weight(*shape) if weight else d.tensor(*shape)


@table("matmul")
def matmul_of_all_ranks(d: Draw) -> Call:
    n, k, m = d.size(), d.size(), d.size()
    batch = d.shape(0, 2)
    ranks = d.int(0, 3)
    weight = d.flag()
    k_letter = "f" if weight else "s"
    left = [*d.stretched(batch), n, k] if ranks & 1 else [k]
    right = [*d.stretched(batch), k, m] if ranks & 2 else [k]
    words = "f" * (len(left) - 1) + k_letter, "f" * (len(right) - 2) + k_letter + "f" * (len(right) > 1)
    return call(aten.matmul.default, d.tensor(*left), operand(d, weight, *right), expect=" ".join(words))


@table("mm bmm mv dot vdot")
def products_of_fixed_rank(d: Draw) -> Call:
    b, n, k, m = (d.size() for _ in range(4))
    weight = d.flag()
    s = "f" if weight else "s"
    return d.pick(
        call(aten.mm.default, d.tensor(n, k), operand(d, weight, k, m), expect=f"f{s} {s}f"),
        call(aten.bmm.default, d.tensor(b, n, k), operand(d, weight, b, k, m), expect=f"ff{s} f{s}f"),
        call(aten.mv.default, d.tensor(n, k), operand(d, weight, k), expect=f"f{s} {s}"),
        call(d.pick(aten.dot.default, aten.vdot.default), d.tensor(k), operand(d, weight, k), expect=f"{s} {s}"),
    )


@table("addmm baddbmm")
def product_added_to_something_that_broadcasts(d: Draw) -> Call:
    b, n, k, m = (d.size() for _ in range(4))
    weight = d.flag()
    s = "f" if weight else "s"
    options = {"beta": 2, "alpha": 0.5} if d.flag() else {}
    flat, in_place = d.flag(), d.flag()
    out = [n, m] if flat else [b, n, m]
    bias = d.tensor(*out) if in_place else d.tensor(*d.stretched(out))
    word = "f" * bias.dim() or "-"
    if flat:
        op = aten.addmm_.default if in_place else aten.addmm.default
        operands, words = (d.tensor(n, k), operand(d, weight, k, m)), f"{word} f{s} {s}f"
    else:
        op = aten.baddbmm_.default if in_place else aten.baddbmm.default
        operands, words = (d.tensor(b, n, k), operand(d, weight, b, k, m)), f"{word} ff{s} f{s}f"
    return call(op, bias, *operands, expect=words, **options)


@table("outer ger")
def outer_product(d: Draw) -> Call:
    return call(d.pick(aten.outer.default, aten.ger.default), d.tensor(d.size()), d.tensor(d.size()), expect="f f")


@table("bilinear")
def bilinear_form(d: Draw) -> Call:
    lead, i, j, o = d.shape(1, 2), d.size(), d.size(), d.size()
    x1, x2 = d.tensor(*lead, i), d.tensor(*lead, j)
    word, bias = "f" * len(lead), (d.weight(o),) if d.flag() else ()
    if d.flag():
        weight, words = d.weight(o, i, j), f"{word}f {word}f fff"
    else:
        weight, words = d.tensor(o, i, j), f"{word}s {word}s fss"
    return call(aten.bilinear.default, x1, x2, weight, *(bias or (None,)), expect=words + " f" * len(bias))


EQUATIONS = (
    "ij->ji",
    "ij->i",
    "ij->",
    "ii->i",
    "bii->b",
    "i,j->ij",
    "ij,jk->ik",
    "bij,bjk->bik",
    "bhqd,bhkd->bhqk",
    "bhqk,bhkd->bqhd",
    "bqhd, bkhd -> bhqk",
    "bhwc,hkc->bhwk",
    "bc,c->bc",
    "bij,bij->b",
    "Bi,oi,Bj,oj->Bo",
    "bn,anm,bm->ba",
    "i,i,i->",
    "abc,acd,de->be",
)
# Written with an ellipsis, or without what comes out; and in full.
SHORT = {
    "...ij,...jk->...ik": "bcij,bcjk->bcik",
    "...ij,jk->...ik": "bcij,jk->bcik",
    "i..., ...j -> ...ij": "ibc,bcj->bcij",
    "...i,...i": "bci,bci->bc",
    "...ij->...": "bij->b",
    "...i->i": "bci->i",
    "ij,jk": "ij,jk->ik",
    "ba": "ba->ab",
    "b...a": "bca->cab",
    "Bi,oB": "Bi,oB->io",
    "ii": "ii->",
}


@table("einsum")
def einsum_ties_equal_letters(d: Draw) -> Call:
    equation = d.pick(*EQUATIONS, *SHORT)
    inputs, output = (SHORT.get(equation) or equation).replace(" ", "").split("->")
    terms = inputs.split(",")
    size = {letter: d.size() for letter in sorted(set(inputs))}
    weight = d.int(0, len(terms)) - 1
    operands = []
    for number, term in enumerate(terms):
        stretched = not any(term.count(c) > 1 for c in term) and d.int(0, 4) == 0
        lone = d.pick(*term) if stretched else ""
        lone = lone if any(lone in other for other in terms[:number] + terms[number + 1 :]) else ""
        operands.append(operand(d, number == weight, *(1 if c == lone else size[c] for c in term)))
    words = ("".join("f" if c in output else "?" for c in term) for term in terms)
    return call(aten.einsum.default, equation, operands, expect=" ".join(words))


@table("einsum")
def einsum_of_activations_sums_what_does_not_come_out(d: Draw) -> Call:
    q, k = d.tensor(2, 3, 4, 6), d.tensor(2, 3, 5, 6)
    return call(aten.einsum.default, "bhqd,bhkd->bhqk", [q, k], expect="fffs fffs")


@table("einsum")
def einsum_with_a_weight_is_exact(d: Draw) -> Call:
    x, w = d.tensor(2, 3, 6), d.weight(4, 6)
    return call(aten.einsum.default, "bti,oi->bto", [x, w], expect="fff ff")


@table("einsum")
def einsum_with_an_ellipsis_of_other_ranks(d: Draw) -> Call:
    x, y = d.tensor(2, 3, 4, 6), d.tensor(3, 6, 5)
    return call(aten.einsum.default, "...ij,...jk->...ik", [x, y], expect="fffs fsf", out="ffff")


@table("inner")
def products_of_all_rows(d: Draw) -> Call:
    k, weight = d.size(), d.flag()
    a, b = d.shape(0, 2), d.shape(0, 2)
    s = "f" if weight else "s"
    words = f"{'f' * len(a)}{s} {'f' * len(b)}{s}"
    return call(aten.inner.default, d.tensor(*a, k), operand(d, weight, *b, k), expect=words)


@table("tensordot")
def contraction_of_several_dimensions(d: Draw) -> Call:
    i, j, k, m = (d.size(one=False) for _ in range(4))
    weight, two = d.flag(), d.flag()
    s = "f" if weight else "s"
    if two:
        args = d.tensor(i, j, k), operand(d, weight, k, m, j), [1, -1], [2, 0]
        return call(aten.tensordot.default, *args, expect=f"f{s}{s} {s}f{s}", out="ff")
    args = d.tensor(i, j, k), operand(d, weight, k, m), [-1], [0]
    return call(aten.tensordot.default, *args, expect=f"ff{s} {s}f", out="fff")


@table("cdist pairwise_distance kron")
def known_and_not_followed(d: Draw) -> Call:
    op = d.pick(aten.cdist.default, aten.pairwise_distance.default, aten.kron.default)
    return call(op, d.tensor(3, 4), d.tensor(3, 4), expect="!! !!")


@table("_grouped_mm")
def experts_keep_their_rows(d: Draw) -> Call:
    tokens, inside, outside, experts = 16, 4 * d.int(1, 4), 4 * d.int(1, 4), d.int(1, 3)
    x = d.integers(5, tokens, inside).float()  # small integers: float32 sums of them are exact
    weight = torch.nn.Parameter(d.integers(5, experts, inside, outside).float())
    ends = torch.tensor([5 * (i + 1) for i in range(experts - 1)] + [tokens], dtype=torch.int32)
    return call(aten._grouped_mm.default, x, weight, ends, expect="!f !ff !")


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
