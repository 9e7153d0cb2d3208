"""Calibration: gradients against the eager module's own, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.errors import PreconditionError
from graphwright.graph.program import Program
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.calibration import Gradients, Threshold, calibrate
from graphwright.passes.criteria import NEEDS_GRADIENTS
from graphwright.passes.importance import scoring_of
from graphwright.passes.remove_channels import RemoveChannels


class Flattened(nn.Module):
    """Convolution, batch norm, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def made(cls: Callable[[], nn.Module] = Flattened, seed: int = 0) -> Any:
    """A module with every parameter away from its initial value."""
    module = cls().double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def picture(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model: Any, x: Tensor) -> Tensor:
    return model(x).square().sum() + model(x).sum()


def gradients(model: Any, batches: list[Tensor]) -> list[dict[str, Tensor]]:
    """The eager module's gradients, one dictionary a batch."""
    found = []
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return found


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Program, list[Tensor]]:
    model = made()
    return model, capture(model, (picture(2),)), list(picture(3).split(1))


def test_gradients_are_summed_over_the_batches(setting: Any) -> None:
    model, program, batches = setting
    sums = calibrate(program, Context(loss=loss, batches=batches)).sums

    for name, grads in ((n, [g[n] for g in gradients(model, batches)]) for n, _ in model.named_parameters()):
        torch.testing.assert_close(sums[name], sum(grads))
        assert sums[name].abs().max() > 0


def test_hessian_takes_the_mean_of_squares_and_not_the_square_of_the_mean(setting: Any) -> None:
    model, program, batches = setting
    whole = torch.cat(batches)
    single = calibrate(program, Context(loss=loss, batches=batches), squares=True).squared_means
    split = calibrate(program, Context(loss=loss, batches=[whole], split=lambda b: b.split(1)), squares=True)
    batch = calibrate(program, Context(loss=loss, batches=[whole]), squares=True)

    per_sample = gradients(model, batches)
    for name, got in single.items():
        want = sum(g[name] ** 2 for g in per_sample) / len(per_sample)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(split.squared_means[name], want)
        # A batch that is not taken apart is one sample.
        torch.testing.assert_close(batch.squared_means[name], batch.sums[name] ** 2)
    assert not torch.allclose(batch.squared_means["conv.weight"], single["conv.weight"], rtol=0.1)


def context(**more: Any) -> Context:
    return Context(**{"loss": loss, "batches": [picture(2)], **more})


@pytest.mark.parametrize("criterion", sorted(NEEDS_GRADIENTS))
@pytest.mark.parametrize("missing", [{"loss": None}, {"batches": []}])
def test_missing_calibration_says_what_to_give(criterion: str, missing: dict[str, Any], setting: Any) -> None:
    with pytest.raises(PreconditionError, match=r"needs calibration: give Context\(loss=\.\.\., batches=\[\.\.\.\]\)"):
        scoring_of(setting[1], criterion, context(**missing))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            lambda p, x: p(x).sum() * float("nan"),
            "calibration loss is nan for batch 0; check the batch and the weights",
        ),
        (lambda p, x: p(x).sum() * float("inf"), "calibration loss is -?inf for batch 0"),
        (lambda p, x: p(x), r"must be a scalar tensor, got \[2, 2\] for batch 0"),
        (lambda p, x: 1.0, "must be a scalar tensor, got float for batch 0"),
        (lambda p, x: x.sum(), "does not depend on the program's parameters; call the program in it"),
    ],
)
def test_a_bad_calibration_loss_is_refused_in_one_sentence(bad: Any, message: str, setting: Any) -> None:
    with pytest.raises(PreconditionError, match=message) as caught:
        calibrate(setting[1], context(loss=bad))
    assert "\n" not in str(caught.value)


def test_calibration_leaves_gradients_flags_and_weights_of_the_caller_as_they_were() -> None:
    model = made()
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    program = capture(model, (picture(2),))

    found = calibrate(program, context(), squares=True)

    assert set(found.sums) == set(found.squared_means) == set(before)
    assert model.conv.weight.grad is None and not model.conv.weight.requires_grad
    assert torch.equal(model.head.weight.grad, torch.full_like(model.head.weight, 7.0))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_tied_weights_get_the_gradient_of_all_their_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.a, self.b, self.o = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.b(self.a(self.i(x)).tanh()))

    model = made(Tied)
    x = torch.randn(2, 3, dtype=torch.float64)
    program = capture(model, (x,))
    loss(model, x).backward()
    sums = calibrate(program, Context(loss=loss, batches=[x])).sums
    for name in set(sums) & {"a.weight", "b.weight"}:
        torch.testing.assert_close(sums[name], model.a.weight.grad)
    assert "a.weight" in sums


def test_progress_reports_every_batch() -> None:
    seen: list[tuple[str, int, int]] = []
    program = capture(made(), (picture(2),))
    calibrate(program, context(batches=[picture(1), picture(2)], progress=lambda *a: seen.append(a)))
    assert seen == [("calibration", 1, 2), ("calibration", 2, 2)]


# ---------------------------------------------------------------------- which samples count


class Scaled(nn.Module):
    """Its loss on a batch is the batch's own number, so that the curve is what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


CURVE = [0.8, 1.0, 0.6, 0.3, 0.7, 0.1]


def counted(fraction: float, stop: bool) -> Gradients:
    program = capture(Scaled(), (torch.ones(2, 1, dtype=torch.float64),))
    batches = [torch.full((2, 1), value / 2, dtype=torch.float64) for value in CURVE]
    return calibrate(program, Context(loss=lambda p, x: p(x).mean(), batches=batches), False, Threshold(fraction, stop))


@pytest.mark.parametrize(
    ("fraction", "stop", "used", "seen"),
    [
        (0.0, True, [0, 1, 2, 3, 4, 5], 6),
        (0.5, True, [0, 1, 2], 4),
        (0.5, False, [0, 1, 2, 4], 6),
        (0.05, True, [0, 1, 2, 3, 4, 5], 6),
        (0.99, True, [0, 1], 3),  # the largest so far is above any fraction of itself
    ],
)
def test_samples_below_a_fraction_of_the_largest_loss_add_nothing(
    fraction: float, stop: bool, used: list[int], seen: int
) -> None:
    found = counted(fraction, stop)
    assert list(found.used) == used
    assert found.losses == pytest.approx(CURVE[:seen])
    # The gradient of a batch with the loss c is c / 2; the sample that ended it is not in the sum.
    assert float(found.sums["weight"]) == pytest.approx(sum(CURVE[i] / 2 for i in used), rel=1e-12)


def test_the_pass_calibrates_on_the_samples_that_count_and_says_how_many() -> None:
    model = made()
    program = capture(model, (picture(),))
    small = 1e-3 * picture()
    ctx = Context(loss=lambda p, x: p(x).square().mean(), batches=[picture(), 2 * picture(), small, small])
    some = Pipeline([RemoveChannels(criterion="taylor", loss_threshold=0.5)])(program, ctx).records[0].result
    assert some.stats["calibration_samples_used"] < some.stats["calibration_samples_seen"] <= 4
    every = Pipeline([RemoveChannels(criterion="taylor")])(program, ctx).records[0].result
    assert every.stats["calibration_samples_used"] == every.stats["calibration_samples_seen"] == 4
    magnitude = Pipeline([RemoveChannels()])(program, ctx).records[0].result
    assert "calibration_samples_used" not in magnitude.stats
