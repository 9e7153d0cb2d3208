"""Channel removal: against modules built small from sliced weights, its limits and schedule, and what it refuses."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.cost import cost
from graphwright.graph.errors import PreconditionError
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.remove_channels import RemovalResult, RemoveChannels

# Float64 sums of at most a few hundred terms, in another order.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def removed(model: nn.Module, x: Tensor, ctx: Context | None = None, **options: Any) -> tuple[Any, RemovalResult]:
    """Capture, remove, and return the smaller program with the result of the pass."""
    done = Pipeline([RemoveChannels(**options)])(capture(model, (x,)), ctx)
    result = done.records[0].result
    assert isinstance(result, RemovalResult)
    return done.output, result


def widths(result: RemovalResult) -> dict[str, int]:
    return {w.group: w.after for w in result.widths}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: nn.Module) -> Any:
    with torch.no_grad():
        for i, (name, t) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if t.is_floating_point():
                t.copy_(noise(*t.shape, seed=i).abs() + 0.5 if "var" in name else noise(*t.shape, seed=i))
    return model.double().eval()


def conv_net() -> Any:
    return filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3)))


def mlp(*sizes: int) -> Any:
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return filled(nn.Sequential(*layers[:-1]))


def test_the_result_equals_a_module_built_at_the_smaller_size_from_the_strongest_slices() -> None:
    model = conv_net()
    x = noise(2, 3, 4, 4)
    program, result = removed(model, x, ratio=0.5, criterion="magnitude-l2", reduction="sum")

    conv, norm, _, _, head = model
    columns = head.weight.detach().view(3, 8, 4)
    energy = conv.weight.detach().square().sum((1, 2, 3)) + norm.weight.detach().square() + columns.square().sum((0, 2))
    kept = energy.topk(4).indices.sort().values
    small = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double().eval()
    )
    state = {k: v[kept] if v.dim() and len(v) == 8 else v for k, v in model.state_dict().items()}
    state["4.weight"] = columns[:, kept].flatten(1)
    small.load_state_dict(state)

    assert result.removal is not None and list(result.removal.groups["0:channel"].kept) == kept.tolist()
    torch.testing.assert_close(program(x), small(x), **EXACT)
    assert small(x).abs().max() > 0.1
    assert set(program.tensors()) == set(state)


def test_stats_count_what_was_asked_for_and_what_was_achieved() -> None:
    model = conv_net()
    program, result = removed(model, noise(2, 3, 4, 4), ratio=0.5)
    (width,) = result.widths
    assert (width.group, width.kind, width.before, width.wanted, width.after) == ("0:channel", "channel", 8, 4.0, 4)
    after = cost(program)
    assert result.stats["groups"] == result.stats["groups_shrunk"] == 1
    assert result.stats["indices_before"] == 8 and result.stats["indices_removed"] == 4
    assert result.stats["parameters_before"] == sum(p.numel() for p in model.parameters())
    assert result.stats["parameters_after"] == after.parameters < result.stats["parameters_before"]
    assert result.stats["macs_after"] == after.total_macs < result.stats["macs_before"]


class Cascade(nn.Module):
    """Four branches through three nested concatenations."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()

        def block(*sizes: int) -> nn.Sequential:
            pairs = zip(sizes, sizes[1:], strict=False)
            layers = [part for a, b in pairs for part in (nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.GELU())]
            return nn.Sequential(*layers[:-1])

        self.block1, self.block2 = block(width, width, width), block(width, 2 * width, 2 * width)
        self.block3, self.block4 = block(width, 3 * width), block(width, 6 * width)
        self.output = nn.Conv2d(12 * width, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.block1(x), self.block2(x)], 1)
        joined = torch.cat([joined, self.block3(x)], 1)
        return self.output(torch.cat([joined, self.block4(x)], 1))


def test_cascaded_concat_has_widths_5_10_15_30_after_five_steps() -> None:
    seen: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "removal":
            seen.append(done)

    ctx = Context(progress=progress)
    program, result = removed(filled(Cascade()), noise(2, 10, 3, 3), ctx, ratio=0.5, criterion="random", steps=5)

    tensors = program.tensors()
    first = {name: len(tensors[f"{name}.0.weight"]) for name in ("block1", "block2", "block3", "block4")}
    assert first == {"block1": 5, "block2": 10, "block3": 15, "block4": 30}
    assert tensors["output.weight"].shape[1] == 60
    assert seen == [1, 2, 3, 4, 5]
    assert set(widths(result).values()) == {5, 10, 15, 30}


def test_each_step_is_measured_on_the_initial_width() -> None:
    # The same ratio one fifth at a time: 20 indices lose 2 in every step, not 10 % of what is left.
    model, x = mlp(4, 20, 3), noise(2, 4)
    for steps, ratio in ((1, 0.1), (2, 0.2), (3, 0.3), (5, 0.5)):
        _, result = removed(model, x, ratio=ratio, steps=steps)
        assert widths(result) == {"0:hidden": 20 - 2 * steps}


def test_scores_are_taken_anew_before_each_step() -> None:
    """Two of three slices are redundant together: after one of them is gone, the other is the strongest."""
    model = filled(mlp(2, 3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.6]]))
        model[0].bias.zero_()
        model[2].weight.fill_(1.0)
    x = torch.rand(8, 2, dtype=torch.float64) + 0.5
    want = model(x).detach()
    calls: list[int] = []

    def loss(program: Any, batch: Tensor) -> Tensor:
        calls.append(sum(t.shape[0] for n, t in program.tensors().items() if n == "0.weight"))
        return (program(batch) - want).square().mean() + program(batch).mean()

    removed(model, x, Context(loss=loss, batches=[x]), ratio=0.67, steps=2, criterion="taylor")
    assert calls == [3, 2]


def test_max_ratio_and_min_width_hold_in_one_shot() -> None:
    model, x = mlp(4, 16, 16, 3), noise(2, 4)
    _, result = removed(model, x, ratio=0.9, max_ratio=0.3)
    assert widths(result) == {"0:hidden": 12, "2:hidden": 12}
    _, result = removed(model, x, ratio=0.9, min_width=5)
    assert widths(result) == {"0:hidden": 5, "2:hidden": 5}
    _, result = removed(model, x, ratio=0.9, scope="global", max_ratio=0.25)
    assert min(widths(result).values()) == 12


@pytest.mark.parametrize("scope", ["local", "global"])
def test_no_group_is_emptied_even_at_the_highest_ratio(scope: str) -> None:
    program, result = removed(mlp(4, 16, 3, 2), noise(2, 4), ratio=0.999, scope=scope)
    assert set(widths(result).values()) <= {1, 2, 3, 16} and min(widths(result).values()) >= 1
    assert program(noise(2, 4)).shape == (2, 2)


def test_a_group_that_would_vanish_keeps_one_index_and_the_report_says_what_was_wanted() -> None:
    _, result = removed(mlp(4, 16, 3, 2), noise(2, 4), ratio=0.95)
    narrow = next(w for w in result.widths if w.before == 3)
    assert narrow.after == 1 and narrow.wanted == pytest.approx(0.15)
    _, result = removed(mlp(4, 16, 3, 2), noise(2, 4), ratio=0.95, min_width=3)
    (skipped,) = [s for s in result.skipped if s.site == narrow.group]
    assert skipped.reason.startswith("3 of 3 stay where 0.15 were wanted") and "min_width 3" in skipped.reason


def test_a_model_is_let_go_after_a_removal() -> None:
    model = mlp(4, 16, 3)
    alive = weakref.ref(model), weakref.ref(model[0].weight)
    assert widths(removed(model, noise(2, 4))[1]) == {"0:hidden": 8}
    assert RemoveChannels().ratios is not RemoveChannels().ratios
    del model
    capture(mlp(4, 5, 3), (noise(2, 4),))  # torch itself holds on to the last graph that it exported
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_round_to_never_gives_zero() -> None:
    _, result = removed(mlp(4, 16, 3), noise(2, 4), ratio=0.9, round_to=8)
    assert widths(result) == {"0:hidden": 8}


def test_equal_scores_lose_exactly_the_wanted_number_in_a_global_scope() -> None:
    model = mlp(4, 8, 8, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    _, result = removed(model, noise(2, 4), ratio=0.25, scope="global", normaliser="mean", reduction="first")
    assert sum(widths(result).values()) == 12


def test_global_scope_removes_more_where_slices_are_weaker() -> None:
    model = mlp(4, 12, 12, 3)
    with torch.no_grad():
        model[0].weight *= 0.01
    options: dict[str, Any] = {"scope": "global", "normaliser": "none", "reduction": "first"}
    _, result = removed(model, noise(2, 4), ratio=0.25, **options)
    # The second layer's slices are stronger as a whole; its inputs do not count under `first`.
    assert widths(result) == {"0:hidden": 6, "2:hidden": 12}
    assert {s.site: s.reason for s in result.skipped} == {
        "2:hidden": "no index of it is among the least important of its scope"
    }
    # Where a group is down to what must stay, others go in its place.
    _, result = removed(model, noise(2, 4), ratio=0.5, **options)
    assert widths(result) == {"0:hidden": 1, "2:hidden": 11}
    _, result = removed(model, noise(2, 4), ratio=0.5, max_ratio=0.75, **options)
    assert widths(result) == {"0:hidden": 3, "2:hidden": 9}


def test_ignore_takes_names_of_modules_and_refuses_what_matches_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    _, result = removed(model, x, ratio=0.5, ignore=("0",))
    assert {w.group: w.after for w in result.widths} == {"0:hidden": 8, "2:hidden": 3}
    wrong: list[dict[str, Any]] = [{"ignore": ("encoder.0",)}, {"ratios": {"encoder.0": 0.1}}]
    for options in wrong:
        with pytest.raises(
            PreconditionError, match=r"(ignore|ratios) of remove-channels: nothing of Sequential matches"
        ):
            removed(model, x, **options)
    # A module without a group: there is nothing to ignore of it.
    removed(model, x, ignore=("4.bias",))


def test_ratios_and_ignore_match_group_and_parameter_names() -> None:
    model, x = mlp(4, 10, 10, 10, 3), noise(2, 4)
    _, result = removed(model, x, ratio=0.5, ratios={"2:*": 0.2}, ignore=("4.weight",))
    # The third layer's weight is a member of the groups on both of its sides.
    assert widths(result) == {"0:hidden": 5, "2:hidden": 10, "4:hidden": 10}
    assert {s.site for s in result.skipped} == {"2:hidden", "4:hidden"}
    assert all("ratio is 0" in s.reason for s in result.skipped)
    _, result = removed(model, x, ratio=0.5, ratios={"2:*": 0.2})
    assert widths(result) == {"0:hidden": 5, "2:hidden": 8, "4:hidden": 5}


def test_a_group_that_cannot_shrink_says_what_holds_it() -> None:
    _, result = removed(mlp(4, 6, 3), noise(2, 4), ratio=0.5, round_to=8)
    (skip,) = result.skipped
    assert skip.site == "0:hidden"
    assert skip.reason.startswith("6 of 6 stay where 3 were wanted") and "round_to 8" in skip.reason
    assert not result.modified


def test_an_unscored_group_is_skipped_with_the_reason_and_the_others_shrink() -> None:
    model = filled(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    )
    _, result = removed(model, noise(2, 3, 4, 4), ratio=0.5, criterion="bn-scale")
    assert widths(result) == {"0:channel": 4, "2:channel": 6}
    (skip,) = result.skipped
    assert skip.site == "2:channel" and "no batch norm with a weight carries it" in skip.reason


def test_a_criterion_that_scores_no_group_is_refused() -> None:
    with pytest.raises(PreconditionError, match="bn-scale scores none of the 1 groups of Sequential .*choose another"):
        removed(mlp(4, 8, 3), noise(2, 4), criterion="bn-scale")


@pytest.mark.parametrize("rows", [8, 12])
def test_a_fused_gated_unit_keeps_the_rounded_fraction_of_its_hidden_units(rows: int) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 2 * rows), nn.Linear(rows, 5)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.up(x).chunk(2, -1)
            return self.down(value * F.gelu(gate))

    for ratio in (0.25, 0.5, 0.7):
        program, result = removed(filled(Gated()), noise(2, 7, 5), ratio=ratio)
        kept = round((1 - ratio) * rows)
        assert widths(result) == {"up:hidden": kept}
        assert program.tensors()["up.weight"].shape == (2 * kept, 5)


def test_heads_and_head_dims_go_independently_of_widths() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.i(x)
            q, k, v = (part(h).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    x = noise(2, 5, 12)
    program, result = removed(filled(Attention()), x, ratio=0, head_ratio=0.34)
    assert {w.kind: w.after for w in result.widths} == {"hidden": 12, "head": 2, "head dim": 4, "value dim": 4}
    assert program.tensors()["q.weight"].shape == (8, 12)
    _, result = removed(filled(Attention()), x, ratio=0, head_ratio=0.99, head_dim_ratio=0.5)
    assert {w.kind: w.after for w in result.widths} == {"hidden": 12, "head": 1, "head dim": 2, "value dim": 2}
