"""Scores by activations, against hooks on the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import PreconditionError
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.importance import importance, scoring_of
from graphwright.passes.remove_channels import RemoveChannels


class Net(nn.Module):
    """A convolution that two layers read, one of them flattened; and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 1)
        self.flat = nn.Linear(6 * 9, 5)
        self.last = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(self.flat(x.flatten(1))) @ self.last + self.second(x).mean((1, 2, 3))[:, None]


def test_scores_are_the_mean_magnitudes_that_layers_read() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    batches = [torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3) + 1]
    read: dict[str, list[Tensor]] = {"second": [], "flat": []}

    def keep(name: str) -> None:
        model.get_submodule(name).register_forward_pre_hook(lambda _module, args: read[name].append(args[0]))

    for name in read:
        keep(name)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    second = sum(v.abs().double().mean((0, 2, 3)) for v in read["second"])
    # All nine positions of a flattened channel go with it.
    flat = sum(v.abs().double().mean(0).view(6, 9).sum(1) for v in read["flat"])
    for values in read.values():
        values.clear()

    def loss(module: Any, batch: Tensor) -> Tensor:
        return module(batch).sum()

    program = capture(model, (batches[0],))
    scoring = scoring_of(program, "activation", Context(loss=loss, batches=batches))
    graph = depgraph(program)
    channels = next(g for g in graph.groups if g.size == 6)
    found = importance(channels, scoring, "activation", "mean")
    assert isinstance(second, Tensor) and isinstance(flat, Tensor)
    torch.testing.assert_close(found, (second + flat) / 2)
    assert float(found.std()) > 0.1
    hidden = next(g for g in graph.groups if g.size == 5)
    assert importance(hidden, scoring, "activation").shape == (5,)  # read by the product with the parameter


def test_what_cannot_be_scored_is_refused() -> None:
    program = capture(Net().eval(), (torch.randn(2, 2, 3, 3),))
    step = RemoveChannels(criterion="activation")
    with pytest.raises(PreconditionError, match="activations need calibration"):
        Pipeline([step])(program)
    with pytest.raises(PreconditionError, match="does not call the program"):
        Pipeline([step])(program, Context(loss=lambda m, b: b.sum(), batches=[torch.ones(2)]))
