"""Coupling groups of the shapes that structural pruning gets wrong: which indices of which tensors go together.

The rows of the edge-case matrix are removed and compared with the mask oracle in tests/tools/test_sweep.py; here are
the index sets themselves, written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import DepGraph, depgraph
from graphwright.graph.oracle import masked_outputs
from graphwright.graph.resize import resize
from graphwright.passes.base import Pipeline
from graphwright.passes.remove_channels import RemoveChannels


class Net(nn.Module):
    """Named layers and a function of the module and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(a: int, b: int, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **more)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph_of(model: nn.Module, x: Tensor) -> DepGraph:
    return depgraph(capture(model.double().eval(), (x,)))


def slices(graph: DepGraph) -> set[frozenset[tuple[str, int, tuple[int, ...]]]]:
    """What goes with each index, over all groups: sets of ``(tensor, dimension, indices)``."""
    return {
        frozenset((m.name, m.dim, tuple(m.positions()[i].tolist())) for m in group.members)
        for group in graph.groups
        for i in range(group.size)
    }


def unit(*members: tuple[str, int, int | tuple[int, ...]]) -> frozenset[tuple[str, int, tuple[int, ...]]]:
    return frozenset((n, d, i if isinstance(i, tuple) else (i,)) for n, d, i in members)


PICTURE, TOKENS = noise(2, 3, 8, 8), noise(2, 6, 5)

# ---------------------------------------------------------------------- split


def _split(join: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        u, v = m.a(x).split([4, 3], 1)
        return join(m, u, v)

    return Net(run, a=conv(3, 7, bias=False), b1=conv(4, 2, bias=False), b2=conv(3, 2, bias=False))


@pytest.mark.parametrize(
    "join",
    [
        pytest.param(lambda m, u, v: m.b1(u) + m.b2(v), id="first_then_second"),
        pytest.param(lambda m, u, v: m.b2(v) + m.b1(u), id="second_then_first"),
        pytest.param(lambda m, u, v: torch.cat([m.b2(v.relu()), m.b1(u)], 1), id="concatenated_in_reverse"),
        pytest.param(lambda m, u, v: m.b2(v).sigmoid() * m.b1(u), id="gated_by_the_second"),
    ],
)
def test_the_parts_of_a_split_go_with_their_own_consumers_in_any_order(join: Any) -> None:
    first = {unit(("a.weight", 0, i), ("b1.weight", 1, i)) for i in range(4)}
    second = {unit(("a.weight", 0, 4 + i), ("b2.weight", 1, i)) for i in range(3)}
    assert slices(graph_of(_split(join), PICTURE)) == first | second


def test_a_split_whose_first_part_is_unused_goes_with_the_second_consumer() -> None:
    found = slices(graph_of(_split(lambda m, u, v: m.b2(v)), PICTURE))
    assert {unit(("a.weight", 0, 4 + i), ("b2.weight", 1, i)) for i in range(3)} <= found
    # The unused part can go without any consumer.
    assert found - {unit(("a.weight", 0, 4 + i), ("b2.weight", 1, i)) for i in range(3)} == {
        unit(("a.weight", 0, i)) for i in range(4)
    }


def test_a_half_through_a_layer_couples_the_layer_with_the_other_half() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        u, v = m.a(x).chunk(2, 1)
        return m.c(u * m.b(v).sigmoid())

    model = Net(run, a=conv(3, 6, bias=False), b=conv(3, 3, bias=False), c=conv(3, 2, bias=False))
    gate = {unit(("a.weight", 0, i), ("b.weight", 0, i), ("c.weight", 1, i)) for i in range(3)}
    inner = {unit(("a.weight", 0, 3 + i), ("b.weight", 1, i)) for i in range(3)}
    assert slices(graph_of(model, PICTURE)) == gate | inner


# ---------------------------------------------------------------------- real dimensions


def _features(dim: int, split: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        if split:
            u, v = m.a(x).chunk(2, dim)
            return m.c(F.silu(u) * v)
        return m.c(torch.cat([m.a(x), m.b(x)], dim))

    return Net(run, a=nn.Linear(5, 8), b=nn.Linear(5, 3), c=nn.Linear(4 if split else 11, 2))


@pytest.mark.parametrize("split", [False, True])
def test_a_negative_dimension_and_the_positive_one_give_the_same_groups(split: bool) -> None:
    negative, positive = (slices(graph_of(_features(dim, split), TOKENS)) for dim in (-1, 2))
    assert negative == positive
    assert len(negative) == (4 if split else 11)


@pytest.mark.parametrize(
    ("join", "x"),
    [
        pytest.param(lambda u, v: torch.cat([u, v], 1), TOKENS, id="cat_tokens"),
        pytest.param(lambda u, v: torch.cat([u, v], -2), TOKENS, id="cat_tokens_negative"),
        pytest.param(lambda u, v: torch.cat([u, v], 0), TOKENS, id="cat_batch"),
        pytest.param(lambda u, v: sum(torch.cat([u, v], 1).chunk(2, 1)), TOKENS, id="chunk_tokens"),
        pytest.param(lambda u, v: sum((u + v).chunk(2, -2)), TOKENS, id="chunk_tokens_negative"),
    ],
)
def test_joining_and_cutting_tokens_and_batches_leaves_features_alone(join: Any, x: Tensor) -> None:
    model = Net(lambda m, x: m.c(join(m.a(x), m.b(x))), a=nn.Linear(5, 4), b=nn.Linear(5, 4), c=nn.Linear(4, 2))
    assert slices(graph_of(model, x)) == {
        unit(*((f"{n}.{p}", 0, i) for n in "ab" for p in ("weight", "bias")), ("c.weight", 1, i)) for i in range(4)
    }


@pytest.mark.parametrize("dim", [2, 3, -1, -2])
def test_cutting_the_height_or_width_leaves_channels_alone(dim: int) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        u, v = m.a(x).chunk(2, dim)
        return m.b(u) + m.c(v)

    model = Net(run, a=conv(3, 4, bias=False), b=conv(4, 2), c=conv(4, 2))
    assert slices(graph_of(model, PICTURE)) == {
        unit(("a.weight", 0, i), ("b.weight", 1, i), ("c.weight", 1, i)) for i in range(4)
    }


# ---------------------------------------------------------------------- flatten


@pytest.mark.parametrize(("kind", "dims"), [("Conv1d", 1), ("Conv2d", 2), ("Conv3d", 3)])
@pytest.mark.parametrize("beside", [False, True])
def test_a_flattened_channel_owns_its_run_of_columns_also_beside_a_sequence_layer(
    kind: str, dims: int, beside: bool
) -> None:
    cells = 2**dims

    def run(m: Any, x: Tensor) -> Any:
        y = m.c(m.a(x).flatten(1))
        return (y, m.t(x.flatten(2))) if beside else y

    a = getattr(nn, kind)(3, 4, 3, bias=False)
    model = Net(run, a=a, c=nn.Linear(4 * cells, 2), t=nn.Linear(4**dims, 2))
    assert slices(graph_of(model, noise(2, 3, *[4] * dims))) == {
        unit(("a.weight", 0, i), ("c.weight", 1, tuple(range(i * cells, (i + 1) * cells)))) for i in range(4)
    }


def test_a_channel_flattened_after_a_permutation_owns_every_nth_column() -> None:
    model = Net(lambda m, x: m.c(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 4, bias=False), c=nn.Linear(256, 2))
    assert slices(graph_of(model, PICTURE)) == {
        unit(("a.weight", 0, i), ("c.weight", 1, tuple(range(i, 256, 4)))) for i in range(4)
    }


def test_concatenated_flattened_branches_own_columns_at_their_offsets() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.v(x.mean((2, 3))), m.a(x).flatten(1), m.b(x).flatten(1)], 1))

    parts = {"a": nn.Conv2d(3, 2, 7, bias=False), "b": nn.Conv2d(3, 3, 7, bias=False)}
    model = Net(run, v=nn.Linear(3, 4, bias=False), c=nn.Linear(4 + 8 + 12, 2), **parts)
    want = {unit(("v.weight", 0, i), ("c.weight", 1, i)) for i in range(4)}
    for name, start, count in (("a", 4, 2), ("b", 12, 3)):
        columns = [tuple(range(start + 4 * i, start + 4 * i + 4)) for i in range(count)]
        want |= {unit((f"{name}.weight", 0, i), ("c.weight", 1, columns[i])) for i in range(count)}
    assert slices(graph_of(model, PICTURE)) == want


# ---------------------------------------------------------------------- group norm


def test_group_norm_after_an_unequal_concat_is_declared_and_stays_divisible() -> None:
    model = Net(
        lambda m, x: m.c(F.silu(m.n(torch.cat([m.a(x), m.b(x)], 1)))),
        **{"a": conv(3, 64), "b": conv(3, 32), "n": nn.GroupNorm(8, 96), "c": conv(96, 2)},
    )
    program = capture(model.double().eval(), (PICTURE,))
    graph = depgraph(program)
    # 12 channels to a group: the border at 64 lies inside the sixth, so a removal moves channels between groups.
    assert {g.size: g.exactness for g in graph.groups} == {64: "renormalised", 32: "renormalised"}
    assert all("group_norm" in "".join(g.because) and g.constraints for g in graph.groups)
    for seed in range(4):
        done = Pipeline([RemoveChannels(ratio=0.4, criterion="random", seed=seed)])(program)
        assert done.output.tensors()["n.weight"].shape[0] % 8 == 0
        assert done.removal.groups
        keep = {name: list(cut.kept) for name, cut in done.removal.groups.items()}
        torch.testing.assert_close(
            done.output(PICTURE), masked_outputs(graph, keep, [PICTURE])[0], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("seed", range(6))
def test_group_norm_over_one_axis_keeps_equally_many_channels_in_every_group(seed: int) -> None:
    model = nn.Sequential(conv(3, 24), nn.GroupNorm(4, 24), nn.ReLU(), nn.GroupNorm(6, 24), conv(24, 2))
    program = capture(model.double().eval(), (PICTURE,))
    (group,) = depgraph(program).groups
    done = Pipeline([RemoveChannels(ratio=0.5, criterion="random", seed=seed)])(program)
    kept = torch.tensor(done.removal.groups[group.name].kept)

    assert group.exactness == "renormalised" and group.blocks == 12
    for groups in (4, 6):
        assert torch.bincount(kept // (24 // groups)).tolist() == [12 // groups] * groups


def test_whole_removal_of_a_norms_channels_is_refused() -> None:
    model = nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), conv(8, 2))
    program = capture(model.double().eval(), (PICTURE,))
    (group,) = depgraph(program).groups
    assert group.step == 4 and group.legal_keep(1) == 4 and group.legal_keep(5) == 4
    with pytest.raises(Exception, match="7 channels would be left for .*group_norm.* 4 equal parts.*steps of"):
        resize(program, {group.name: list(range(7))})


# ---------------------------------------------------------------------- no exact equivalent


@pytest.mark.parametrize(
    ("function", "parts", "reason"),
    [
        (lambda m, x: m.c(m.a(x).softmax(1)), {}, "softmax over it"),
        (
            lambda m, x: m.c((h := m.a(x)) * m.e(h.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]),
            {"e": nn.Conv1d(1, 1, 3, padding=1)},
            "spatial size",
        ),
    ],
    ids=["softmax_over_the_channels", "convolution_along_the_channels"],
)
def test_what_has_no_exact_equivalent_is_refused_at_planning_time(function: Any, parts: Any, reason: str) -> None:
    graph = graph_of(Net(function, a=conv(3, 8), c=conv(8, 2), **parts), PICTURE)
    assert graph.groups == ()
    assert ("a.weight", 0) in {m for f in graph.frozen if f.reason == reason for m in f.members}
