"""Caches on graphs that no library has: what joins are found there, and that both programs are right.

The oracle is the model itself with a ``keep`` hook: it calls ``self.at(name, value)`` where a value can be kept, which
gives the value back, or another one that a test put there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.dataflow import dataflow
from graphwright.graph.joins import residual_joins, skip_joins
from graphwright.passes.insert_feature_cache import REGISTER, InsertFeatureCache
from graphwright.passes.insert_layer_cache import InsertLayerCache, branch_register
from graphwright.tools.zoo.entry import seeded_init, source, tensors

WIDTH = 8
EQUAL = 1e-6  # both sides run the same kernels: 0.0 is measured


class Model(nn.Module):
    """Layers by name, made of letters: ``c`` is a convolution, ``l`` a linear layer, ``t`` a layer over the time."""

    def __init__(self, layers: str, body: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        for spec in layers.split():
            kind, _, widths = spec.partition(":")
            fan_in, _, fan_out = (widths or f"{WIDTH}-{WIDTH}").partition("-")
            make = (
                nn.Conv2d(int(fan_in), int(fan_out), 3, padding=1)
                if kind[0] == "c"
                else nn.Linear(int(fan_in), int(fan_out))
            )
            self.add_module(kind, make)
        self.body, self.put, self.kept = body, dict[str, Tensor](), dict[str, Tensor]()

    def at(self, name: str, value: Tensor) -> Tensor:
        """Note a value, or exchange it for what a test put there. In a capture it is the value."""
        if torch.compiler.is_compiling():
            return value
        self.kept[name] = value.detach().clone()
        return self.put.get(name, value).clone() if name in self.put else value

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return self.body(self, sample, timestep)


def map_of(m: Any, timestep: Tensor, like: Tensor) -> Tensor:
    """The time as a map, by a layer of its own."""
    return m.t(timestep[:, None])[:, :, None, None].expand(-1, -1, *like.shape[2:])


def built(layers: str, body: Callable[[Any, Tensor, Tensor], Any]) -> Model:
    model = Model(layers, body).eval()
    seeded_init(model, 3)
    return model


def inputs(kind: str, late: bool) -> dict[str, Tensor]:
    shape = (2, WIDTH, 8, 8) if kind == "map" else (2, 5, WIDTH)
    return {"sample": torch.randn(shape, generator=source(9 + late)), "timestep": torch.tensor([0.3, 0.8]) + 0.2 * late}


def eager(model: Model, given: dict[str, Tensor], **put: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.put, model.kept = put, {}
    with torch.no_grad():
        out = tensors(model(**{name: value.clone() for name, value in given.items()}))
    return out, model.kept


def run(program: gw.Program, given: dict[str, Tensor], **registers: Tensor) -> list[Tensor]:
    """Return what a program of a model with tensors for results gives, registers last."""
    with torch.no_grad():
        return tensors(program(**{name: value.clone() for name, value in given.items()}, **registers))


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EQUAL)


def check_skips(model: Model, names: list[str]) -> list[dict[str, float]]:
    """Check that the branches, in order, keep the values that the model names so; return the statistics of each."""
    before, now = inputs("map", False), inputs("map", True)
    program = gw.capture(model, (), before)
    assert len(skip_joins(program)) == len(names)
    old, kept = eager(model, before)
    new, _ = eager(model, now)
    found = []
    for branch, name in enumerate(names):
        result: Any = InsertFeatureCache(branch=branch)(program.copy())
        refresh, reuse = (result.output.stages[stage].program for stage in ("refresh", "reuse"))
        *out, register = run(refresh, now)
        close(out, new)
        close(run(reuse, now, **{REGISTER: register}), new)
        register = run(refresh, before)[-1]
        torch.testing.assert_close(register, kept[name], rtol=0, atol=EQUAL)
        held = register.clone()
        want, _ = eager(model, now, **{name: kept[name]})
        for _ in range(2):
            close(run(reuse, now, **{REGISTER: register}), want)
        assert torch.equal(register, held)
        assert all(float((want[0] - other[0]).abs().max()) > 1e-3 for other in (new, old))
        found.append(dict(result.stats) | {"live": len(dataflow(reuse).live()), "reads": len(reuse.parameters())})
    return found


def check_residuals(model: Model, kinds: str, names: list[str]) -> None:
    """Check that the branches, in order, keep the values that the model names so, one by one and all together."""
    before, now = inputs("tokens", False), inputs("tokens", True)
    program = gw.capture(model, (), before)
    assert "".join(join.kind[0] for join in residual_joins(program)) == kinds
    patterns = [(i,) for i in range(len(kinds))] + ([tuple(range(len(kinds)))] if len(kinds) > 1 else [])
    stages = gw.Pipeline([InsertLayerCache(reuse=((), *patterns))])(program).plan.stages
    old, kept = eager(model, before)
    new, _ = eager(model, now)
    with torch.no_grad():
        out, fresh = stages["refresh"].program(**{k: v.clone() for k, v in now.items()})
        close(tensors(out), new)
        stale = stages["refresh"].program(**{k: v.clone() for k, v in before.items()})[1]
    for i, pattern in enumerate(patterns):
        reuse = stages[f"reuse_{i}"].program
        taken = [branch_register(number) for number in pattern]
        close(run(reuse, now, **{name: fresh[name] for name in taken}), new)
        want, _ = eager(model, now, **{names[number]: kept[names[number]] for number in pattern})
        held = {name: stale[name].clone() for name in taken}
        for _ in range(2):
            close(run(reuse, now, **{name: stale[name] for name in taken}), want)
        assert all(torch.equal(stale[name], held[name]) for name in taken)
        assert all(float((want[0] - other[0]).abs().max()) > 1e-3 for other in (new, old)), pattern
        assert len(reuse.parameters()) < len(program.parameters())


def down(m: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def up(m: Any, x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def u(m: Any, x: Tensor, t: Tensor, join: Callable[..., Tensor], act: Callable[[Tensor], Tensor] = torch.relu) -> Any:
    """A U of two levels: ``join(main, skip)`` gives what the decoder's convolutions read."""
    first = act(m.c0(x)) + m.t(t[:, None])[:, :, None, None]
    second = act(m.c1(down(m, first)))
    deep = m.at("one", act(m.c2(second)) - m.c3(second))
    main = m.at("zero", up(m, act(m.c4(join(deep, second)))))
    return m.c5(join(main, first))


U = "t:1-8 c0 c1 c2 c3 c4:16-8 c5:16-8"


def test_three_tensors_in_one_concatenation() -> None:
    model = built(U.replace("16", "24"), lambda m, x, t: u(m, x, t, lambda a, s: torch.cat([s, a, s * 2], 1)))
    stats = check_skips(model, ["zero", "one"])
    assert stats[0]["macs_reuse"] < stats[1]["macs_reuse"] < stats[0]["macs_refresh"]


def test_a_constant_and_a_map_of_the_time_are_no_skips() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        first = m.c0(x) + map_of(m, t, x)
        deep = m.c2(m.c1(first))
        deep = m.c6(torch.cat([deep, torch.ones_like(deep[:, :1])], 1))
        deep = m.at("zero", m.c7(torch.cat([deep, map_of(m, t, deep)], 1)))
        return m.c5(torch.cat([deep, first], 1))

    check_skips(built("t:1-8 c0 c1 c2 c6:9-8 c7:16-8 c5:16-8", body), ["zero"])


def test_the_larger_of_two_networks_in_a_row_is_the_one() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        x = m.c9(torch.cat([m.c8(x), x], 1))
        x = m.c7(torch.cat([up(m, m.c6(down(m, x))), x], 1))
        return u(m, x, t, lambda a, s: torch.cat([a, s], 1))

    check_skips(built(U + " c6 c7:16-8 c8 c9:16-8", body), ["zero", "one"])


def test_skips_that_the_main_path_weighs_and_skips_with_layers_are_refused() -> None:
    def weighed(m: Any, a: Tensor, s: Tensor) -> Tensor:
        return s * torch.sigmoid(m.l6((a + s).transpose(1, 3)).transpose(1, 3))

    for skip in (weighed, lambda m, a, s: m.l6(s.transpose(1, 3)).transpose(1, 3)):
        body = lambda m, x, t, skip=skip: u(m, x, t, lambda a, s: torch.cat([a, skip(m, a, s)], 1))  # noqa: E731
        program = gw.capture(built(U + " l6", body), (), inputs("map", False))
        with pytest.raises(gw.PreconditionError, match="skip connections that are concatenated, and Model has none"):
            InsertFeatureCache()(program)


def test_operators_in_place_keep_nothing_alive_and_do_not_write_into_what_is_kept() -> None:
    def join(a: Tensor, s: Tensor) -> Tensor:
        a[:, : WIDTH // 2] = a[:, : WIDTH // 2] * 1.5  # as FreeU does
        joined = torch.cat([a, s], 1)
        a.mul_(2)
        return joined

    model = built(U, lambda m, x, t: u(m, x, t, join, lambda v: v.relu_()))
    plain = built(U, lambda m, x, t: u(m, x, t, lambda a, s: torch.cat([a, s], 1)))
    stats, others = check_skips(model, ["zero", "one"]), check_skips(plain, ["zero", "one"])
    assert [s["macs_reuse"] for s in stats] == [s["macs_reuse"] for s in others]
    assert [s["reads"] for s in stats] == [s["reads"] for s in others]


def test_a_skip_connection_is_cut_before_views_of_one_memory() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        first = m.c0(x) + map_of(m, t, x)
        deep = m.at("zero", m.c1(first))
        view = deep.transpose(2, 3).transpose(2, 3)
        deep.mul_(2)
        return m.c5(torch.cat([view, first], 1))

    check_skips(built("t:1-8 c0 c1 c5:16-8", body), ["zero"])


def test_a_branch_that_is_changed_through_another_view_is_refused() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        h = m.la(x) + gate(m, t)
        branch = m.lb(h)
        view = branch.transpose(1, 2).transpose(1, 2)
        branch.mul_(2)
        return m.lc(h + view)

    program = gw.capture(built(ONE, body), (), inputs("tokens", False))
    with pytest.raises(gw.PreconditionError, match="shares its memory, in which values are changed in place; let the"):
        InsertLayerCache()(program)


def test_sums_instead_of_concatenations_are_refused() -> None:
    model = built(U.replace("16", "8"), lambda m, x, t: u(m, x, t, lambda a, s: a + s))
    program = gw.capture(model, (), inputs("map", False))
    with pytest.raises(gw.PreconditionError, match="skip connections that are concatenated, and Model has none"):
        InsertFeatureCache()(program)


def nested(m: Any, x: Tensor, t: Tensor) -> Tensor:
    """A U whose first level and whose decoder hold a U of their own."""
    first = m.c0(x) + map_of(m, t, x)
    inner = up(m, torch.relu(m.c6(down(m, first))))
    first = m.c7(torch.cat([inner, first], 1))
    second = torch.relu(m.c1(down(m, first)))
    deep = m.at("one", m.c3(torch.relu(m.c2(second))))
    main = m.at("zero", up(m, m.c4(torch.cat([deep, second], 1))))
    out = torch.relu(m.c5(torch.cat([main, first], 1)))
    return m.c9(torch.cat([up(m, m.c8(down(m, out))), out], 1))


def test_a_u_inside_of_a_level_is_not_counted() -> None:
    layers = "t:1-8 c0 c1 c2 c3 c4:16-8 c5:16-8 c6 c7:16-8 c8 c9:16-8"
    stats = check_skips(built(layers, nested), ["zero", "one"])
    assert stats[0]["macs_reuse"] < stats[1]["macs_reuse"] < stats[0]["macs_refresh"]


def test_two_decoders_are_cut_where_both_begin() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        first = m.c0(x) + map_of(m, t, x)
        deep = m.at("both", m.c2(torch.relu(m.c1(down(m, first)))))
        a, b = up(m, torch.relu(m.c3(deep))), up(m, torch.relu(m.c4(deep)))
        return m.c5(torch.cat([a, first], 1)), m.c6(torch.cat([b, first], 1))

    (stats,) = check_skips(built("t:1-8 c0 c1 c2 c3 c4 c5:16-8 c6:16-8", body), ["both"])
    assert stats["macs_reuse"] < stats["macs_refresh"]


def test_a_skip_that_is_also_a_result_and_a_head_on_the_main_path() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = m.c0(x) + map_of(m, t, x)
        second = torch.relu(m.c1(down(m, first)))
        deep = m.at("one", torch.relu(m.c2(second)))
        main = m.at("zero", up(m, m.c4(torch.cat([deep, second], 1))))
        return m.c5(torch.cat([main, first], 1)), first * 2, m.c3(main)

    stats = check_skips(built("t:1-8 c0 c1 c2 c3 c4:16-8 c5:16-8", body), ["zero", "one"])
    assert stats[0]["macs_reuse"] < stats[1]["macs_reuse"]


def attention(m: Any, x: Tensor, name: str) -> Tensor:
    q = m.get_submodule(f"l{name}")(x)
    return torch.softmax(q @ x.transpose(1, 2) / 3, -1) @ x


ONE = "t:1-8 la lb lc ld le"


def gate(m: Any, t: Tensor) -> Tensor:
    return m.t(t[:, None])[:, None]


def parallel_in_turn(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x)
    n = F.layer_norm(h, (WIDTH,))
    y = h + gate(m, t) * m.at("attention", m.lc(attention(m, n, "b")))
    return m.le(y + m.at("mlp", m.ld(n).relu()))


def parallel_sum(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x)
    n = F.layer_norm(h, (WIDTH,))
    both = m.at("attention", m.lc(attention(m, n, "b"))) + m.at("mlp", m.ld(n).relu())
    return m.le(h + gate(m, t) * both)


def post_norm(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x) + gate(m, t)
    h = F.layer_norm(h + m.at("attention", m.lc(attention(m, h, "b"))), (WIDTH,))
    return m.le(F.layer_norm(h + m.at("mlp", m.ld(h).relu()), (WIDTH,)))


def scaled_and_cast(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = (m.la(x) + gate(m, t)).double()
    h = h * 0.8 + gate(m, t).double() * m.at("attention", m.lc(attention(m, h.float(), "b"))).double()
    low = F.layer_norm(h, (WIDTH,)).float()
    return m.le(((h + 0.5 * m.at("mlp", m.ld(low))) / 1.2).float())


def in_place(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x)
    h += gate(m, t) * m.at("attention", m.lc(attention(m, h, "b")))
    r = m.at("mlp", m.ld(F.layer_norm(h, (WIDTH,))))
    r *= gate(m, t)
    r += h
    return m.le(r)


def stream_of_the_sum(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x)
    n = F.layer_norm(h + gate(m, t) * m.at("attention", m.lc(attention(m, h, "b"))), (WIDTH,))
    return m.le(h + m.at("mlp", m.ld(n).relu()))


def other_sums(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x)
    h = torch.addcmul(h, gate(m, t), m.at("attention", m.lc(attention(m, h, "b"))), value=0.7)
    return m.le(h - m.at("mlp", m.ld(h).relu()))


def gate_behind_a_view(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x)
    gated = gate(m, t).unflatten(-1, (2, -1)) * m.at("attention", m.lc(attention(m, h, "b")).unflatten(-1, (2, -1)))
    h = h + gated.flatten(2)
    return m.le(h + (gate(m, t) * m.at("mlp", m.ld(h))).reshape(h.shape))


def mixed(m: Any, x: Tensor, t: Tensor) -> Tensor:
    h = m.la(x) + gate(m, t)
    h = torch.lerp(h, m.at("attention", m.lc(attention(m, h, "b"))), 0.4)
    return m.le(0.3 * h + 0.7 * m.at("mlp", m.ld(h).relu()))


BODIES = [
    parallel_in_turn,
    parallel_sum,
    post_norm,
    scaled_and_cast,
    in_place,
    stream_of_the_sum,
    other_sums,
    gate_behind_a_view,
    mixed,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_attention_and_feed_forward_are_branches(body: Any) -> None:
    check_residuals(built(ONE, body), "am", ["attention", "mlp"])


def test_a_router_makes_no_attention_and_linear_attention_is_one() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        h = m.la(x) + gate(m, t)
        weights = torch.softmax(m.lb(h), -1)
        h = h + m.at("experts", weights[..., :1] * m.lc(h) + weights[..., 1:2] * m.ld(h))
        q, k = F.relu(m.le(h)), F.relu(m.lf(h))
        return m.lg(h + m.at("linear", q @ (k.transpose(1, 2) @ h)))

    check_residuals(built(ONE + " lf lg", body), "ma", ["experts", "linear"])


def test_a_wrapper_is_not_a_branch_beside_what_it_wraps() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        x = m.la(x) + gate(m, t)
        h = m.lb(x)
        h = h + m.at("mlp", m.lc(h).relu())
        return m.le(x + m.ld(h))

    check_residuals(built(ONE, body), "m", ["mlp"])


def test_dead_operators_in_place_are_gone() -> None:
    def body(m: Any, x: Tensor, t: Tensor) -> Tensor:
        first = m.c0(x) + map_of(m, t, x)
        second = m.c1(first)
        kernel = torch.zeros(WIDTH, WIDTH, 1, 1)
        kernel[torch.arange(WIDTH), torch.arange(WIDTH)] = 1.0
        deep = F.conv2d(F.dropout(second.relu_(), 0.1, False, inplace=True), kernel)
        return m.c5(torch.cat([m.at("zero", m.c2(deep)), first], 1))

    model = built("t:1-8 c0 c1 c2 c5:16-8", body)
    check_skips(model, ["zero"])
    program = gw.capture(model, (), inputs("map", False))
    reuse = gw.Pipeline([InsertFeatureCache()])(program).plan.stages["reuse"]
    assert not dataflow(reuse.program).writes
