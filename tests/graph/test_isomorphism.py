"""Classes of coupling groups: the published partitions, and what must and must not tell two groups apart."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph import keys
from graphwright.graph.depgraph import DepGraph, depgraph
from graphwright.graph.isomorphism import group_graphs, isomorphism_classes


def analysed(model: nn.Module, shape: tuple[int, ...]) -> DepGraph:
    return depgraph(capture(model.eval(), (torch.empty(shape, device=next(model.parameters()).device),), dynamic={}))


def partition(graph: DepGraph) -> dict[str, list[int]]:
    """Return the widths of the groups of each class, by the name of its first group."""
    classes = isomorphism_classes(graph)
    found: dict[str, list[int]] = {}
    for group in graph.groups:
        found.setdefault(classes[group.name], []).append(group.size)
    return found


def of_library(kind: str, config: str, **options: object) -> DepGraph:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    return analysed(model, (1, 3, 224, 224))


@pytest.mark.parametrize(
    ("depths", "groups", "inner"), [([3, 4, 6, 3], 37, 32), ([3, 4, 23, 3], 71, 66), ([3, 8, 36, 3], 105, 100)]
)
def test_partition_of_resnets(depths: list[int], groups: int, inner: int) -> None:
    found = partition(of_library("ResNetForImageClassification", "ResNetConfig", depths=depths))
    assert sum(map(len, found.values())) == groups
    assert sorted(map(len, found.values())) == [1, 1, 1, 1, 1, inner]
    assert sorted(sizes[0] for sizes in found.values() if len(sizes) == 1) == [64, 256, 512, 1024, 2048]
    assert set(max(found.values(), key=len)) == {64, 128, 256, 512}


def test_partition_of_a_vision_transformer() -> None:
    graph = of_library("DeiTForImageClassificationWithTeacher", "DeiTConfig")
    found = partition(graph)
    # The published analysis has one group for the attention of a layer; here heads and both head widths are apart.
    assert Counter(tuple(sizes) for sizes in found.values()) == Counter(
        {(768,): 1, (12,) * 12: 1, (64,) * 12: 2, (3072,) * 12: 1}
    )
    # With those three taken for one: 25 groups in 3 classes.
    classes = isomorphism_classes(graph)
    attention = {"head", "head dim", "value dim"}
    groups = {
        g.name.partition(".attention")[0] if g.kind in attention else g.name: classes[g.name] for g in graph.groups
    }
    assert len(groups) == 25
    assert len({"attention" if g.kind in attention else classes[g.name] for g in graph.groups}) == 3


def test_partition_of_convnext() -> None:
    options = {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}
    found = partition(of_library("ConvNextForImageClassification", "ConvNextConfig", **options))
    assert sorted(map(len, found.values())) == [1, 1, 1, 1, 36]
    assert Counter(max(found.values(), key=len)) == {512: 3, 1024: 3, 2048: 27, 4096: 3}


def test_partition_of_mobilenet() -> None:
    found = partition(of_library("MobileNetV2ForImageClassification", "MobileNetV2Config"))
    assert sorted(map(sorted, found.values()), key=len) == [
        [24],
        [64],
        [1280],
        [16, 320],
        [32, 96, 160],
        sorted([32, 96, 144, 144, *[192] * 3, *[384] * 4, *[576] * 3, *[960] * 3]),
    ]


# ---------------------------------------------------------------------- what tells groups apart


class Pair(nn.Module):
    """Two branches behind one another; options change the second."""

    def __init__(self, width: int = 8, norm: bool = False, branch: bool = False, swap: bool = False) -> None:
        super().__init__()
        self.a_in, self.a_out = nn.Linear(6, 8), nn.Linear(8, 6)
        self.other_name, self.z = nn.Linear(6, width), nn.Linear(width, 6)
        self.norm = nn.LayerNorm(width) if norm else None
        self.side = nn.Linear(width, 6) if branch else None
        self.swap = swap

    def forward(self, x: Tensor) -> Tensor:
        h = self.a_in(x)
        x = self.a_out(h * torch.sigmoid(h))
        h = self.other_name(x)
        h = torch.sigmoid(h) * h if self.swap else h * torch.sigmoid(h)
        if self.norm is not None:
            h = self.norm(h)
        out = self.z(h)
        return out if self.side is None else out + self.side(h)


def same_class(model: nn.Module) -> bool:
    graph = analysed(model, (2, 6))
    classes = isomorphism_classes(graph)
    first, second = (
        next(g.name for g in graph.groups if any(m.name == f"{layer}.weight" and m.dim == 0 for m in g.members))
        for layer in ("a_in", "other_name")
    )
    return classes[first] == classes[second]


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"width": 20}, True),
        ({"swap": True}, True),
        ({"norm": True}, False),
        ({"branch": True}, False),
    ],
    ids=["names", "widths", "order of operands", "a norm", "a branch"],
)
def test_only_the_computation_tells_groups_apart(options: dict, same: bool) -> None:
    assert same_class(Pair(**options)) is same


def test_how_elements_are_moved_does_not_matter() -> None:
    class Moved(Pair):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a_in(x)
            x = self.a_out(h * torch.sigmoid(h))
            h = self.other_name(x).unsqueeze(0).reshape(-1, 8)
            return self.z(h * torch.sigmoid(h))

    assert same_class(Moved())


def test_vertices_are_operators_and_parameters() -> None:
    graph = analysed(Pair(), (2, 6))
    (name,) = [g.name for g in graph.groups if any(m.name == "a_in.bias" for m in g.members)]
    found = group_graphs(graph)[name]
    labels = Counter(data[keys.LABEL] for _, data in found.nodes(data=True))
    assert labels == {
        "parameter [0] of 2": 1,
        "parameter [0] of 1": 1,
        "parameter [1] of 2": 1,
        "linear": 2,
        "sigmoid": 1,
        "mul": 1,
    }
    assert found.number_of_edges() == 7
