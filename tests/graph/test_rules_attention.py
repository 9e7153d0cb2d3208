"""Attention and softmax, by the law of ``rule_oracle``."""

from __future__ import annotations

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case

table = Table()
SDPA = aten.scaled_dot_product_attention.default


@table("scaled_dot_product_attention")
def attention(d: Draw) -> Call:
    lead = d.shape(0, 2)
    queries, keys, width, value = (d.size() for _ in range(4))
    causal = d.flag()
    mask = None
    if not causal and d.flag():
        shape = [*d.stretched(lead), d.pick(queries, 1), keys]
        mask = d.booleans(*shape) if d.flag() else d.tensor(*shape)
        if mask.dtype is torch.bool:
            mask[...] = True  # a row without a key is undefined
    # Leading dimensions broadcast in the mathematical form, which is the one that runs in float64.
    q, k, v = (d.tensor(*lead, *last) for last in ((queries, width), (keys, width), (keys, value)))
    word = "f" * len(lead)
    words = [f"{word}{'!' if causal else 'f'}s", f"{word}!s", f"{word}!f"]
    options = {"scale": 0.3} if d.flag() else {}
    rest = (mask, 0.0, causal) if causal or mask is not None else ()
    if mask is not None:
        words.append("".join("!" if i == mask.dim() - 1 else "f" for i in range(mask.dim())) or "-")
    return call(SDPA, q, k, v, *rest, expect=" ".join(words), **options)


@table("scaled_dot_product_attention")
def attention_with_grouped_queries(d: Draw) -> Call:
    batch, heads, repeats = d.size(), d.size(), d.int(1, 3)
    queries, keys, width, value = (d.size() for _ in range(4))
    q = d.tensor(batch, heads * repeats, queries, width)
    k, v = d.tensor(batch, heads, keys, width), d.tensor(batch, heads, keys, value)
    return call(SDPA, q, k, v, None, 0.0, False, enable_gqa=True, expect="fffs ff!s ff!f")


@table("softmax _softmax log_softmax _log_softmax _safe_softmax")
def softmax_freezes_what_it_runs_over(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    dim = d.dim(x.dim())
    word = ["f"] * x.dim()
    word[dim] = "!"
    expect = "".join(word)
    return d.pick(
        call(aten.softmax.int, x, dim, expect=expect),
        call(aten.log_softmax.int, x, dim, torch.float64, expect=expect),
        call(aten._softmax.default, x, dim, False, expect=expect),
        call(aten._log_softmax.default, x, dim, False, expect=expect),
        call(aten._safe_softmax.default, x, dim, expect=expect),
    )


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
