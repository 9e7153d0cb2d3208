"""Training of routers on what a whole sampling run draws: gradients through the run, and pictures nearer to the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from router_toy import CHANNELS, STEPS, TOKENS, Transformer, captured, sample, taken, train
from torch import Tensor

import graphwright as gw
from graphwright.passes.gated_program import gated_program
from graphwright.passes.router_baselines import evenly_spread, random_router, top_down
from graphwright.passes.router_training import Settings, Training
from graphwright.passes.sampling_runs import mean_squared


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return captured()


def picture_error(program: gw.Program, router: gw.LayerRouter, seeds: range = range(100, 104)) -> float:
    """Return the mean squared difference of pictures with the router's cache from those without one."""
    module = gw.Pipeline([router.layer_cache()])(program).plan.module()
    errors = []
    for seed in seeds:
        cached, plain = (sample(model, torch.Generator().manual_seed(seed)) for model in (module, program))
        errors.append(float(mean_squared(cached, plain)))
    return sum(errors) / len(errors)


def test_gradients_are_finite_differences_of_the_pictures_error() -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(8, TOKENS, CHANNELS, dtype=torch.float64), torch.full((8,), 5.0, dtype=torch.float64))
    program = gw.capture(Transformer().double().eval(), inputs)

    def double(denoise: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
        return sample(lambda x, time: denoise(x.double(), time.double()), generator)

    cheap = (1, 3, 5, 7, 9)
    settings = Settings(
        cheap=cheap,
        lam=0.0,
        lam_of_all_reused=0.01,
        lr=0.1,
        weight_decay=0.0,
        seed=0,
        clamp=None,
        follow="teacher",
        threshold=0.1,
        evaluations=STEPS,
        weights=(1.0,) * 5,
        objective="picture",
    )
    training = Training(gated_program(program), settings, "Transformer")
    gates = [torch.full((8,), 0.6, dtype=torch.float64, requires_grad=True) for _ in cheap]

    def error(values: list[Tensor]) -> Tensor:
        training.generator.manual_seed(5)
        return training._picture_error(double, values)

    total = error(gates)
    assert float(total.detach()) > 1e-8
    gradients = torch.autograd.grad(total, gates)
    for row, branch in ((0, 0), (0, 5), (2, 1), (4, 7)):
        moved = []
        for step in (1e-5, -1e-5):
            values = [gate.detach().clone() for gate in gates]
            values[row][branch] += step
            moved.append(float(error(values)))
        assert float(gradients[row][branch]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)
    # An early evaluation is felt through all that come after it.
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_pictures_are_nearer_than_with_other_routers_of_the_size(program: gw.Program) -> None:
    learned = replace(train(program, rounds=40, objective="picture"), threshold=0.5)
    removed = taken(learned, 0.5)
    assert 8 <= removed <= 36
    assert len(learned.settings["mse"]) == 1 and learned.settings["objective"] == "picture"
    mine = picture_error(program, learned)
    others = [evenly_spread(learned, removed), top_down(learned, removed)]
    others += [random_router(learned, removed, seed) for seed in range(10)]
    assert 0 < 2 * mine < min(picture_error(program, other) for other in others)
    everything = top_down(learned, learned.logits.numel())
    assert picture_error(program, everything) == pytest.approx(learned.settings["mse_all_reused"][0], rel=0.5)


def test_a_training_that_was_stopped_goes_on_to_the_same_router(program: gw.Program, tmp_path: Path) -> None:
    whole = train(program, rounds=4, objective="picture")
    file = tmp_path / "state"
    train(program, rounds=2, objective="picture", checkpoint=file)
    rest = train(program, rounds=4, objective="picture", checkpoint=file, resume=True)
    assert torch.equal(rest.logits, whole.logits) and rest.settings == whole.settings
    with pytest.raises(gw.PreconditionError, match="of a training with objective picture, and this one has result"):
        train(program, rounds=4, checkpoint=file, resume=True)


def test_weights_stay_bit_for_bit_and_get_no_gradient() -> None:
    model = Transformer().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = gw.capture(model, (torch.randn(8, TOKENS, CHANNELS), torch.full((8,), 5.0)))
    router = train(program, objective="picture", rounds=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert bool((router.logits != train(program, rounds=2).logits).any())


@torch.no_grad()
def without_gradients(denoise: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
    return sample(denoise, generator)


def nothing(denoise: Callable[..., Tensor], generator: torch.Generator) -> None:
    sample(denoise, generator)


def not_a_number(denoise: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
    return sample(denoise, generator) * float("nan")


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (without_gradients, {}, "what sample returned has no gradient.*without torch.no_grad"),
        (nothing, {}, "sample returned NoneType, and pictures are compared"),
        (not_a_number, {}, "the mean squared difference is nan in the picture of round 0"),
        (sample, {"objective": "pictures"}, "objective must be one of result, picture, got 'pictures'"),
        (sample, {"follow": "student"}, "the objective 'picture' follows the gates"),
        (sample, {"weights": [1.0, 1.0, 1.0, 1.0, 2.0]}, "has one loss for all evaluations"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    program: gw.Program, run: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(gw.PreconditionError, match=message):
        train(program, run, **{"objective": "picture", **options})
