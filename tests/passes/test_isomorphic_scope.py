"""Ranking inside classes of isomorphic groups (arXiv 2407.04616), beside ranking of everything and of each group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.passes.base import Pipeline
from graphwright.passes.remove_channels import RemovalResult, RemoveChannels


class TwoKinds(nn.Module):
    """Two plain hidden layers with weights a hundred times those of two gated ones."""

    def __init__(self, widths: tuple[int, int, int, int] = (10, 14, 8, 16)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.plain = nn.ModuleList(nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (a, b))
        self.gate = nn.ModuleList(nn.Linear(6, n) for n in (c, d))
        self.up = nn.ModuleList(nn.Linear(6, n) for n in (c, d))
        self.down = nn.ModuleList(nn.Linear(n, 6) for n in (c, d))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (100.0 if name.startswith("plain") else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.plain:
            x = x + torch.tanh(layer(x))  # the stream is the input, of which nothing can be removed
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            x = x + torch.tanh(down(torch.sigmoid(gate(x)) * up(x)))
        return x


def widths(model: nn.Module, **options: Any) -> tuple[list[int], list[int]]:
    """Return what stays of the plain layers and of the gated ones."""
    result = Pipeline([RemoveChannels(reduction="sum", **options)])(capture(model, (torch.randn(2, 6),)))
    record = result.records[0].result
    assert isinstance(record, RemovalResult)
    after = {w.group: w.after for w in record.widths}
    plain = [n for name, n in after.items() if name.startswith("plain")]
    return plain, [n for name, n in after.items() if not name.startswith("plain")]


def test_global_empties_a_class_and_isomorphic_takes_the_fraction_from_each() -> None:
    model = TwoKinds()
    plain, gated = widths(model, scope="global", ratio=0.45, normaliser="none")
    assert sum(plain) == 24 and gated == [1, 1]  # all but what must stay of the gated layers
    plain, gated = widths(model, scope="isomorphic", ratio=0.45, normaliser="none")
    # Of n indices n - int(n * 0.55) go.
    assert sum(plain) == int(24 * 0.55) and sum(gated) == int(24 * 0.55)
    plain, gated = widths(model, scope="local", ratio=0.45, normaliser="none")
    assert (plain, gated) == ([6, 8], [4, 9])


def test_raw_scores_see_that_a_layer_matters_less_and_scores_over_their_mean_do_not() -> None:
    model = TwoKinds((12, 12, 8, 8))
    with torch.no_grad():
        for p in model.plain[1].parameters():
            p.mul_(0.01)
    raw, _ = widths(model, scope="isomorphic", ratio=0.5, normaliser="none")
    scaled, _ = widths(model, scope="isomorphic", ratio=0.5, normaliser="mean")
    assert raw == [11, 1]
    assert sum(scaled) == 12 and min(scaled) >= 3


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_equal_scores_give_the_exact_fraction_of_each_class(ratio: float) -> None:
    model = TwoKinds((9, 14, 8, 15))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    plain, gated = widths(model, scope="isomorphic", ratio=ratio, normaliser="none")
    assert sum(plain) == max(2, int(23 * (1 - ratio) + 1e-9))
    assert sum(gated) == max(2, int(23 * (1 - ratio) + 1e-9))
    assert min(*plain, *gated) >= 1


def test_no_seed_empties_a_layer() -> None:
    model = TwoKinds((3, 16, 2, 20))
    for seed in range(20):
        plain, gated = widths(model, scope="isomorphic", ratio=0.8, criterion="random", seed=seed)
        assert min(*plain, *gated) >= 1
        assert sum(plain) == int(19 * 0.2 + 1e-9) and sum(gated) == int(22 * 0.2 + 1e-9)


def test_heads_compete_with_heads_only() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    step = RemoveChannels(
        scope="isomorphic",
        ratio=0.5,
        head_ratio=0.5,
        head_dim_ratio=0.25,
        criterion="random",
        seed=3,
        normaliser="none",
    )
    result = Pipeline([step])(capture(model, (torch.randn(2, 3, 8, 8),)))
    record = result.records[0].result
    assert isinstance(record, RemovalResult)
    kept: dict[str, int] = {}
    for width in record.widths:
        kept[width.kind] = kept.get(width.kind, 0) + width.after
    assert kept == {"channel": 16, "hidden": 72, "head": 6, "head dim": 18, "value dim": 18}
    assert len({w.after for w in record.widths if w.kind == "head"}) > 1  # the layers differ
    x = torch.randn(2, 3, 8, 8)
    assert result.program(x).logits.isfinite().all()


def test_the_result_lists_who_competed_and_classes_of_one() -> None:
    result = Pipeline([RemoveChannels(scope="isomorphic")])(capture(TwoKinds(), (torch.randn(2, 6),))).records[0].result
    assert isinstance(result, RemovalResult)
    assert [len(members) for members in result.classes] == [2, 2]
    assert {name.partition(".")[0] for name in result.classes[0]} == {"plain"}
    assert (result.stats["classes"], result.stats["classes_of_one"]) == (2, 0)
    model = TwoKinds()
    model.plain = model.plain[:1]
    result = Pipeline([RemoveChannels(scope="isomorphic")])(capture(model, (torch.randn(2, 6),))).records[0].result
    assert isinstance(result, RemovalResult)
    assert (result.stats["classes"], result.stats["classes_of_one"]) == (2, 1)
    result = Pipeline([RemoveChannels(scope="global")])(capture(model, (torch.randn(2, 6),))).records[0].result
    assert isinstance(result, RemovalResult) and result.classes == () and "classes" not in result.stats


def test_a_layer_that_stays_whole_is_listed_with_the_reason() -> None:
    model = TwoKinds((12, 12, 8, 8))
    with torch.no_grad():
        for p in model.plain[1].parameters():
            p.mul_(0.01)
    step = RemoveChannels(scope="isomorphic", ratio=0.25, reduction="sum", normaliser="none")
    result = Pipeline([step])(capture(model, (torch.randn(2, 6),))).records[0].result
    assert isinstance(result, RemovalResult)
    assert {w.group: w.after for w in result.widths if w.group.startswith("plain")} == {
        "plain.0.0:hidden": 12,
        "plain.1.0:hidden": 6,
    }
    (whole,) = [s for s in result.skipped if s.site.startswith("plain")]
    assert (whole.site, whole.reason) == (
        "plain.0.0:hidden",
        "no index of it is among the least important of its scope",
    )


def test_no_seed_leaves_an_attention_without_heads() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        hidden_size=24, num_hidden_layers=6, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    program = capture(transformers.DeiTForImageClassificationWithTeacher(config).eval(), (torch.randn(2, 3, 16, 16),))
    fewest = 3
    for seed in range(20):
        step = RemoveChannels(
            scope="isomorphic", ratio=0.6, head_ratio=0.6, head_dim_ratio=0.3, criterion="random", seed=seed, round_to=2
        )
        result = Pipeline([step])(program).records[0].result
        assert isinstance(result, RemovalResult)
        heads = [w.after for w in result.widths if w.kind == "head"]
        assert len(heads) == 6 and min(w.after for w in result.widths) >= 1
        assert sum(heads) == 18 - (18 - int(18 * 0.4))
        fewest = min(fewest, *heads)
    assert fewest == 1  # some layer would have lost all of them
