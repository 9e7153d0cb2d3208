"""Training of routers on a small random transformer: better than chance, repeatable, resumable, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from router_toy import CHANNELS, STEPS, TOKENS, Transformer, captured, sample, taken, train
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.schedules import alternating
from graphwright.passes.router_baselines import bottom_up, random_router, router_errors, top_down


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return captured()


@pytest.fixture(scope="module")
def learned(program: gw.Program) -> gw.LayerRouter:
    return replace(train(program, rounds=40), threshold=0.5)


def test_a_learned_router_beats_the_best_of_20_random_ones(program: gw.Program, learned: gw.LayerRouter) -> None:
    removed = taken(learned, 0.5)
    assert 10 <= removed <= 35
    drawn = [random_router(learned, removed, seed) for seed in range(20)]
    nothing, everything = top_down(learned, 0), top_down(learned, 40)
    others = [top_down(learned, removed), bottom_up(learned, removed)]
    first, none, all_, *rest = router_errors(program, sample, [learned, nothing, everything, *others, *drawn], rounds=2)
    assert none == 0 and first > 0
    assert 10 * first < min(rest)
    assert 100 * first < all_
    # The measured run before training tells what reusing all costs, on other noise.
    assert all_ == pytest.approx(sum(learned.settings["mse_all_reused"]) / 5, rel=0.3)


def test_a_higher_price_removes_more_and_so_does_a_higher_threshold(
    program: gw.Program, learned: gw.LayerRouter
) -> None:
    assert learned.settings["lam_of_all_reused"] == pytest.approx(0.01)
    dear = train(program, rounds=40, lam_of_all_reused=0.1)
    assert dear.settings["lam"] == pytest.approx(10 * learned.settings["lam"])
    assert dear.settings["lam_of_all_reused"] == pytest.approx(0.1)
    free = train(program, rounds=25, lam=0.0)
    assert taken(free, 0.5) < taken(learned, 0.5) < taken(dear, 0.5)
    counts = [taken(learned, threshold) for threshold in (0.02, 0.1, 0.5, 0.9, 0.98)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


# ---------------------------------------------------------------------- what stays as it is


def test_weights_stay_bit_for_bit_and_get_no_gradient() -> None:
    model = Transformer().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    router = train(gw.capture(model, (torch.randn(8, TOKENS, CHANNELS), torch.full((8,), 5.0))))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad
    start = train_start(router)
    assert bool((router.logits != start).all())  # something was trained


def train_start(router: gw.LayerRouter) -> Tensor:
    return torch.randn(router.logits.shape, generator=torch.Generator().manual_seed(router.settings["seed"]))


def test_one_seed_gives_one_router(program: gw.Program) -> None:
    a, b, other = train(program), train(program), train(program, seed=1)
    assert torch.equal(a.logits, b.logits) and a.settings == b.settings
    assert not torch.equal(a.logits, other.logits)


def test_a_step_at_one_evaluation_changes_its_row_alone(program: gw.Program) -> None:
    router = train(program, cheap=(3, 7), rounds=1, lr=0.1)
    assert router.cheap == (3, 7) and router.logits.shape == (2, 8)
    # The first step of AdamW is of the size of lr, whatever the gradient.
    torch.testing.assert_close((router.logits - train_start(router)).abs(), torch.full((2, 8), 0.1), rtol=0, atol=1e-3)
    assert [len(numbers) > 0 for numbers in router.reuse(0.99)] == [i in (3, 7) for i in range(STEPS)]


def test_the_magnitude_of_the_results_does_not_matter(program: gw.Program) -> None:
    """A network with results a thousandth as large, whose sampler undoes it, gets the same router."""

    class Smaller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Transformer()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.network(x, timestep) / 1024

    def undone(denoise: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
        return sample(lambda x, timestep: denoise(x, timestep) * 1024, generator)

    small = gw.capture(Smaller().eval(), (torch.randn(8, TOKENS, CHANNELS), torch.full((8,), 5.0)))
    a, b = train(program), train(small, undone)
    torch.testing.assert_close(b.logits, a.logits, rtol=0, atol=1e-3)
    assert b.settings["lam"] == pytest.approx(a.settings["lam"] / 1024**2, rel=1e-3)


def test_logits_stay_within_their_bounds(program: gw.Program) -> None:
    assert float(train(program, lr=30.0, rounds=1).logits.abs().max()) == 5
    assert float(train(program, lr=30.0, rounds=1, clamp=None).logits.abs().max()) > 20


# ---------------------------------------------------------------------- going on


class Stopped(Exception):
    pass


@pytest.mark.parametrize("follow", ["teacher", "student"])
def test_a_training_that_was_stopped_goes_on_to_the_same_router(
    program: gw.Program, tmp_path: Path, follow: str
) -> None:
    calls = [0]

    def stops(denoise: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:  # one measured run, four whole rounds, and one that breaks off midway
            denoise(torch.randn(8, TOKENS, CHANNELS, generator=generator), torch.full((8,), 900.0))
            raise Stopped
        return sample(denoise, generator)

    options = {"rounds": 6, "follow": follow, "checkpoint": tmp_path / "state", "checkpoint_rounds": 3}
    with pytest.raises(Stopped):
        train(program, stops, **options)
    reported: list[tuple[str, int, int]] = []
    got = train(program, resume=True, progress=lambda *at: reported.append(at), **options)
    want = train(program, rounds=6, follow=follow)
    assert [at[1:] for at in reported] == [(4, 6), (5, 6), (6, 6)]  # rounds 1 to 3 were in the file
    assert "of 40 gates open" in reported[0][0]
    assert torch.equal(got.logits, want.logits) and got.settings == want.settings
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_checkpoint_of_another_training_is_refused(program: gw.Program, tmp_path: Path) -> None:
    train(program, rounds=1, checkpoint=tmp_path / "state")
    with pytest.raises(gw.PreconditionError, match=r"with lr 0.25, and this one has 0.5"):
        train(program, rounds=2, checkpoint=tmp_path / "state", resume=True, lr=0.5)
    with pytest.raises(gw.PreconditionError, match="1 rounds behind it, and 0 are wanted"):
        train(program, rounds=0, checkpoint=tmp_path / "state", resume=True)
    with pytest.raises(gw.ArtifactError, match="no layer router that"):
        gw.LayerRouter.load(tmp_path / "state")


# ---------------------------------------------------------------------- runs of other kinds


def test_the_run_goes_on_with_what_is_followed(program: gw.Program) -> None:
    """The last result of a round is that of the full model's run, or of the cached run by hand."""
    results: dict[str, Tensor] = {}
    for follow in ("teacher", "student", "thresholded"):
        seen: list[Tensor] = []

        def run(denoise: Callable[..., Tensor], generator: torch.Generator, seen: list[Tensor] = seen) -> None:
            seen.append(sample(denoise, torch.Generator().manual_seed(7)))

        # Bounds close to -10 make every gate shut after the first, measured run.
        train(program, run, rounds=2, lr=30.0, lam=1e3, clamp=(-10.0, -9.9), follow=follow)
        results[follow] = seen[-1]
    with torch.no_grad():
        want = sample(program, torch.Generator().manual_seed(7))
        plan = gw.Pipeline([gw.InsertLayerCache(interval_steps=2)])(program).plan
        cached = sample(plan.module(), torch.Generator().manual_seed(7))
    assert torch.equal(results["teacher"], want)
    torch.testing.assert_close(results["thresholded"], cached, rtol=0, atol=1e-5)
    assert float((cached - want).abs().max()) > 1e-2
    # Gates of sigmoid(-10) are open by 5e-5, which the sampler's last steps amplify.
    assert 0 < float((results["student"] - cached).abs().max()) < 0.01 * float((cached - want).abs().max())


def test_a_solver_with_two_evaluations_a_step_and_inference_mode(program: gw.Program) -> None:
    """Of 12 evaluations of a midpoint solver the five shifted ones are cheap."""

    @torch.inference_mode()
    def midpoint(denoise: Callable[..., Tensor], generator: torch.Generator) -> None:
        x = torch.randn(8, TOKENS, CHANNELS, generator=generator)
        for i in range(6):
            half = x - 0.05 * denoise(x, torch.full((8,), 900.0 - 100 * i))
            x = x - 0.1 * denoise(half, torch.full((8,), 850.0 - 100 * i))

    router = train(program, midpoint, evaluations=12, cheap=alternating(12, per_step=2))
    assert router.cheap == (2, 4, 6, 8, 10) and min(router.settings["mse_all_reused"]) > 0
    assert not router.logits.is_inference()


def test_conditions_apart_keep_their_branches_apart(program: gw.Program) -> None:
    """Two conditions of one input each in a context of its own: the kept branches are those of the own condition."""

    def apart(denoise: Any, generator: torch.Generator) -> None:
        x = {name: torch.randn(4, TOKENS, CHANNELS, generator=generator) for name in ("cond", "uncond")}
        for _ in range(4):
            for name, value in x.items():
                with denoise.cache_context(name):
                    denoise(value, torch.full((4,), 100.0))

    router = train(program, apart, evaluations=4, rounds=1)
    assert router.settings["mse_all_reused"] == [0.0, 0.0]  # the same input again


def test_inputs_of_another_shape_make_a_full_evaluation(program: gw.Program) -> None:
    def shrinks(denoise: Callable[..., Tensor], generator: torch.Generator) -> None:
        for i in range(4):
            batch = 8 if i < 3 else 4
            denoise(torch.randn(batch, TOKENS, CHANNELS, generator=generator), torch.full((batch,), 100.0))

    router = train(program, shrinks, evaluations=4, rounds=1)
    before = train_start(router)
    assert bool((router.logits[0] != before[0]).all()) and torch.equal(router.logits[1], before[1])


# ---------------------------------------------------------------------- what is refused


def nan_at_the_end(denoise: Callable[..., Tensor], generator: torch.Generator) -> None:
    for i in range(STEPS):
        denoise(torch.full((8, TOKENS, CHANNELS), float("nan") if i > 6 else 1.0), torch.full((8,), 5.0))


def too_short(denoise: Callable[..., Tensor], generator: torch.Generator) -> None:
    denoise(torch.zeros(8, TOKENS, CHANNELS), torch.full((8,), 5.0))


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (nan_at_the_end, {}, "the mean squared difference is nan at evaluation 7 of round 0"),
        (too_short, {}, "called the denoiser 1 times in a run, and the schedule is for 10"),
        (lambda denoise, generator: None, {}, "called the denoiser 0 times"),
        (sample, {"evaluations": 8}, "called the denoiser 9 times or more in a run, and the schedule is for 8"),
        (sample, {"cheap": (0, 2)}, "since evaluation 0 is full"),
        (sample, {"follow": "both"}, "follow must be one of teacher, student, thresholded"),
        (sample, {"lam": -1.0}, "lam and lam_of_all_reused 0 or more, .* lam -1.0"),
        (sample, {"lam_of_all_reused": -0.1}, "lam_of_all_reused -0.1"),
        (sample, {"lam_of_all_reused": float("nan")}, "lam_of_all_reused nan"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    program: gw.Program, run: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(gw.PreconditionError, match=message):
        train(program, run, **options)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model, inputs = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    with pytest.raises(gw.PreconditionError, match="has no weights, only their shapes"):
        train(gw.capture(model, (inputs,)))
