"""The paper's relation D and its groups G, against hand-written sets and published counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.layers import layer_dependencies, layer_groups


class Residual(nn.Module):
    """A ResNet block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.a, self.an = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.bn = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = (h + self.bn(self.b(self.an(self.a(h)).relu()))).relu()
        return self.head(h.mean((2, 3)))


class Joined(nn.Module):
    """Two convolutions side by side, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3)
        self.n, self.c = nn.BatchNorm2d(14), nn.Conv2d(14, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.n(torch.cat([self.a(x), self.b(x)], 1)))


def both(*names: str) -> set[tuple[str, str]]:
    """The two sides of each name."""
    return {(name, side) for name in names for side in ("in", "out")}


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, set[tuple[str, str]], set[str], list[set[tuple[str, str]]]]] = {
    # Model, input, inter-layer edges (operator to operator), operators with an intra-layer edge, groups.
    "chain": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.Linear(7, 3)),
        torch.ones(2, 5),
        {("linear", "relu"), ("relu", "linear_1"), ("linear_1", "linear_2")},
        {"relu"},
        [{("0.weight", "out"), ("2.weight", "in")}, {("2.weight", "out"), ("3.weight", "in")}, {("3.weight", "out")}],
    ),
    "residual": (
        Residual,
        torch.ones(2, 3, 8, 8),
        {
            ("conv2d", "conv2d_1"),
            ("conv2d", "add"),
            ("conv2d_1", "batch_norm"),
            ("batch_norm", "relu"),
            ("relu", "conv2d_2"),
            ("conv2d_2", "batch_norm_1"),
            ("batch_norm_1", "add"),
            ("add", "relu_1"),
            ("relu_1", "mean"),
            ("mean", "linear"),
        },
        {"batch_norm", "relu", "batch_norm_1", "add", "relu_1", "mean"},
        [
            {
                ("stem.weight", "out"),
                ("a.weight", "in"),
                ("b.weight", "out"),
                *both("bn.weight"),
                ("head.weight", "in"),
            },
            {("a.weight", "out"), *both("an.weight"), ("b.weight", "in")},
            {("head.weight", "out")},
        ],
    ),
    "concat": (
        Joined,
        torch.ones(2, 3, 8, 8),
        {("conv2d", "cat"), ("conv2d_1", "cat"), ("cat", "batch_norm"), ("batch_norm", "conv2d_2")},
        {"cat", "batch_norm"},
        [
            {("a.weight", "out"), ("b.weight", "out"), *both("n.weight"), ("c.weight", "in")},
            {("c.weight", "out")},
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_relation_and_groups_equal_the_hand_written_sets(name: str) -> None:
    build, x, feeds, symmetric, groups = CASES[name]
    graph = depgraph(capture(build().eval(), (x,)))
    edges = list(layer_dependencies(graph).edges(data="kind"))

    inter = {(u[0], v[0]) for u, v, kind in edges if kind == "inter-layer" and (u[1], v[1]) == ("out", "in")}
    intra = {u[0] for u, v, kind in edges if kind == "intra-layer" and u[0] == v[0]}
    assert inter == feeds
    assert intra == symmetric
    assert len(edges) == len(feeds) + len(symmetric)
    assert sorted(map(sorted, layer_groups(graph))) == sorted(map(sorted, groups))


def _resnet50() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_labels=1000)  # pyright: ignore[reportCallIssue] (taken by **kwargs)
    return ResNetForImageClassification(config), {"pixel_values": torch.empty(2, 3, 224, 224)}


def _vit() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(), add_pooling_layer=False), {"pixel_values": torch.empty(2, 3, 224, 224)}


def _bert() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()), {"input_ids": torch.empty(2, 64, dtype=torch.long)}


def _convnext() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(num_labels=1000)  # pyright: ignore[reportCallIssue] (taken by **kwargs)
    model = ConvNextForImageClassification(config)
    return model, {"pixel_values": torch.empty(2, 3, 224, 224)}


@pytest.mark.parametrize(
    ("build", "inner", "classifier"),
    [
        pytest.param(_resnet50, 37, "classifier.1.weight", id="resnet50_38_with_the_classifier"),
        pytest.param(_vit, 25, None, id="vit_b16_12_attention_12_mlp_1_residual"),
        pytest.param(_bert, 26, None, id="bert_base_with_the_pooler"),
        pytest.param(_convnext, 22, "classifier.weight", id="convnext_t_23_with_the_classifier"),
    ],
)
def test_published_group_counts_hold_on_the_meta_device(
    build: Callable[[], tuple[nn.Module, dict[str, Any]]], inner: int, classifier: str | None
) -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model, inputs = build()
        groups = layer_groups(depgraph(capture(model.eval(), (), inputs)))

    last = {frozenset({(classifier, "out")})} if classifier else set()
    assert last <= set(groups)
    assert len(set(groups) - last) == inner


def test_attention_ties_query_key_value_and_output_into_one_group_of_the_paper() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.i(x)
            q, k, v = (part(h).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
            a = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(a.transpose(1, 2).flatten(2)) + h

    groups = layer_groups(depgraph(capture(Attention().eval(), (torch.ones(2, 5, 8),))))

    attention = {("q.weight", "out"), ("k.weight", "out"), ("v.weight", "out"), ("o.weight", "in")}
    assert frozenset(attention) in groups
    assert len(groups) == 2


def test_constant_positions_of_an_embedding_are_no_features() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.place = nn.Embedding(11, 6), nn.Embedding(7, 6)
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)
            self.register_buffer("positions", torch.arange(7)[None])

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(self.a(self.word(ids) + self.place(self.positions)))

    groups = layer_groups(depgraph(capture(Tokens().eval(), (torch.ones(2, 7, dtype=torch.long),))))

    assert {frozenset(g) for g in groups} == {
        frozenset({("word.weight", "out"), ("place.weight", "out"), ("a.weight", "in")}),
        frozenset({("a.weight", "out"), ("b.weight", "in")}),
        frozenset({("b.weight", "out")}),
    }
