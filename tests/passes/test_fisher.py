"""The Fisher information as a calibration, and OBDC on it, against sample after sample in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import PreconditionError
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.fisher import drawn_labels, fisher_calibration
from graphwright.passes.importance import NotScoredError, importance, scoring_of
from graphwright.passes.remove_channels import RemoveChannels

WIDTH, CLASSES = 5, 3


class Classifier(nn.Module):
    """Convolution with a bias, batch norm, convolution, and a classifier of flattened features."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, WIDTH, 3, bias=bias), nn.BatchNorm2d(WIDTH)
        self.mid, self.head = nn.Linear(WIDTH * 4, 6, bias=bias), nn.Linear(6, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(torch.relu(self.norm(self.conv(x))).flatten(1))))


def made(bias: bool = True) -> Any:
    module = Classifier(bias).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


X = torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense_fisher(model: Any, seed: int) -> tuple[dict[str, Tensor], list[int]]:
    """Squared gradients of single samples, added up and divided by their number, and the labels that were drawn."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(len(X), generator=generator, dtype=torch.float64).tolist()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    labels = []
    for x, number in zip(X, numbers, strict=True):
        logits = model(x[None])[0]
        probabilities = (logits.exp() / logits.exp().sum()).tolist()
        label = 0
        while number >= sum(probabilities[: label + 1]):
            label += 1
        labels.append(label)
        model.zero_grad()
        (-logits.log_softmax(0)[label]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2 / len(X)
    return total, labels


@pytest.mark.parametrize("bias", [False, True])
def test_obdc_is_the_sum_over_a_row_of_squares_times_the_fisher_diagonal(bias: bool) -> None:
    model = made(bias)
    loss, batches, split = fisher_calibration(X.split(4), seed=3)
    program = capture(model, (X[:2],))
    scoring = scoring_of(program, "obdc", Context(loss=loss, batches=batches, split=split))
    fisher, labels = dense_fisher(model, 3)
    assert len(set(labels)) > 1
    first, second = depgraph(program).groups
    for group, layer in ((first, "conv"), (second, "mid")):
        wanted = []
        for k in range(group.size):
            row, f = (t[f"{layer}.weight"][k].detach().flatten() for t in (dict(model.named_parameters()), fisher))
            wanted.append(sum(float(w) ** 2 * (float(h) + 1e-10) for w, h in zip(row, f, strict=True)))
        # The norm and the layers that read the channel take no part: one member is scored.
        got = importance(group, scoring, "obdc", "sum")
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)
        if bias:
            name = f"{layer}.bias"
            more = getattr(model, layer).bias.detach() ** 2 * (fisher[name] + 1e-10)
            torch.testing.assert_close(importance(group, scoring, "obdc", "sum", include_bias=True), got + more)


def test_labels_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0]]).repeat(20_000, 1)
    numbers = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn_labels(logits, numbers), minlength=3) / 20_000
    # Three deviations of a share of 20,000 draws are 0.011.
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.011)
    certain = torch.tensor([[-1e4, 1e4, -1e4]]).repeat(2, 1)
    assert drawn_labels(certain, torch.tensor([0.0, 1 - 1e-7])).tolist() == [1, 1]
    assert int(drawn_labels(torch.zeros(1, 3), torch.tensor([1 - 1e-16], dtype=torch.float64))) == 2


def test_drawn_labels_and_the_datas_own_give_other_scores_and_a_seed_gives_the_same() -> None:
    program = capture(made(), (X[:2],))

    def scores(seed: int) -> Tensor:
        loss, batches, split = fisher_calibration([X], seed)
        scoring = scoring_of(program, "obdc", Context(loss=loss, batches=batches, split=split))
        return importance(depgraph(program).groups[0], scoring, "obdc")

    assert torch.equal(scores(0), scores(0)) and not torch.equal(scores(0), scores(1))
    labels = torch.zeros(len(X), dtype=torch.long)
    ctx = Context(
        loss=lambda p, b: nn.functional.cross_entropy(p(b[0]), b[1]),
        batches=[(X, labels)],
        split=lambda b: list(zip(b[0].split(1), b[1].split(1), strict=True)),
    )
    empirical = importance(depgraph(program).groups[0], scoring_of(program, "obdc", ctx), "obdc")
    assert not torch.allclose(empirical, scores(0), rtol=0.1)


def test_filters_without_a_gradient_go_by_their_size() -> None:
    model = made()
    with torch.no_grad():
        model.mid.weight.zero_()  # nothing reaches the convolution
    loss, batches, split = fisher_calibration([X])
    step = RemoveChannels(criterion="obdc", ratio=0.4)
    result = Pipeline([step])(capture(model, (X[:2],)), Context(loss=loss, batches=batches, split=split))
    sizes = model.conv.weight.detach().square().flatten(1).sum(1)
    kept = result.removal.groups["conv:channel"].kept
    assert list(kept) == sorted(sizes.argsort(descending=True)[:3].tolist())


def test_what_returns_no_class_scores_is_refused_and_may_be_taken_apart() -> None:
    class Wrapped(Classifier):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    program = capture(Wrapped().double().eval(), (X[:2],))
    loss, batches, split = fisher_calibration([X])
    with pytest.raises(PreconditionError, match=r"needs class scores \[1, classes\] of a batch of 1, got dict; give"):
        scoring_of(program, "obdc", Context(loss=loss, batches=batches, split=split))
    loss, batches, split = fisher_calibration([X], logits=lambda module, x: module(x)["logits"])
    assert scoring_of(program, "obdc", Context(loss=loss, batches=batches, split=split)).squared_gradients


def test_a_group_that_no_layer_produces_is_not_scored() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids)[:, 0])

    ids = torch.ones(2, 5, dtype=torch.long)
    program = capture(Looked().eval(), (ids,))
    loss, batches, split = fisher_calibration([ids])
    scoring = scoring_of(program, "obdc", Context(loss=loss, batches=batches, split=split))
    with pytest.raises(NotScoredError, match="obdc cannot score the group 'table:hidden': no weight of a convolution"):
        importance(depgraph(program).groups[0], scoring, "obdc")
