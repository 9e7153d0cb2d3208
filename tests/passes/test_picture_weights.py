"""Weights of evaluations against the effect of an error on a picture that is known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from router_toy import STEPS, captured, sample, taken, train
from torch import Tensor, nn

import graphwright as gw
from graphwright.passes.picture_weights import picture_weights


class Branch(nn.Module):
    """A result that does not depend on the sample: errors at one evaluation do not grow at the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(timestep[:, None].float() / 10)
        return h + self.last(h.sin()) + 0 * x


# The sampler subtracts this times the result of each evaluation.
SHARES = (1.0, 0.5, 1.0, 3.0, 1.0, 0.1)


def loop(denoise: Any, generator: torch.Generator) -> Tensor:
    x = torch.randn(4, 6, generator=generator)
    for i, share in enumerate(SHARES):
        x = x - share * denoise(x, torch.full((4,), 20 - 3 * i))
    return x


def test_the_weight_of_an_evaluation_is_what_the_sampler_makes_of_an_error() -> None:
    torch.manual_seed(0)
    program = gw.capture(Branch().eval(), (torch.randn(4, 6), torch.tensor([3] * 4)))
    weights = torch.tensor(picture_weights(program, loop, evaluations=len(SHARES)))
    want = torch.tensor([share**2 for share in SHARES[1::2]])
    torch.testing.assert_close(weights / weights[0], want / want[0], rtol=1e-3, atol=0)


def test_the_mean_of_the_weighted_errors_is_that_of_the_errors() -> None:
    program = captured()
    weights = picture_weights(program, sample, evaluations=STEPS)
    errors = torch.tensor(train(program).settings["mse_all_reused"])
    # Of the run of one noise, beside the mean over two others.
    assert float((errors * torch.tensor(weights)).mean()) == pytest.approx(float(errors.mean()), rel=0.5)
    assert len(weights) == STEPS // 2 and max(weights) > 1.5 * min(weights)


def test_a_row_of_no_weight_is_reused_in_whole() -> None:
    program = captured()
    plain = train(program, rounds=16, lr=0.5)
    weighted = train(program, rounds=16, lr=0.5, weights=(1, 1, 0, 1, 1))
    counts = weighted.computed(0.5).sum(1).tolist()
    assert counts[2] == 0 and int(plain.computed(0.5).sum(1)[2]) > 0
    assert 0 < taken(weighted, 0.5) < weighted.logits.numel()
    assert weighted.settings["weights"] == (1.0, 1.0, 0.0, 1.0, 1.0)


def test_weights_of_another_number_are_refused() -> None:
    with pytest.raises(gw.PreconditionError, match="weights must be 5 numbers of 0 or more"):
        train(captured(), weights=(1, 2))


def test_a_loop_that_returns_nothing_is_refused() -> None:
    def silent(denoise: Any, generator: torch.Generator) -> None:
        sample(denoise, generator)

    with pytest.raises(gw.PreconditionError, match="let it return what it drew"):
        picture_weights(captured(), silent, evaluations=STEPS)
