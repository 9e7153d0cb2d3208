"""Digits that were asked for: the shipped transformer draws them, guidance is what it says, recipes can judge with it."""

from __future__ import annotations

import re

import pytest
import torch

import graphwright as gw
from graphwright.frontends.builtin import digits_images, digits_labels, load_builtin
from graphwright.frontends.capture import capture
from graphwright.graph.errors import PreconditionError
from graphwright.tools import digits_labels as labelled
from graphwright.tools.digits import digits_frechet
from graphwright.tools.digits_sampler import SCHEDULE, denoiser, sample_digits

COUNT = 100


@pytest.fixture(scope="module")
def dit():
    return load_builtin("digits-dit")[0]


@pytest.fixture(scope="module")
def asked():
    return torch.arange(COUNT) % 10


@pytest.fixture(scope="module")
def drawn(dit, asked):
    return {
        w: labelled.sample_labelled_digits(labelled.labelled_denoiser(dit), asked, steps=10, guidance=w, seed=3)
        for w in (1.0, 2.0)
    }


def test_what_is_asked_for_is_drawn_and_guidance_helps(drawn, asked):
    plain, strong = (labelled.label_agreement(drawn[w], asked) for w in (1.0, 2.0))
    assert plain >= 0.9 and strong >= 0.95
    # The judge is no flatterer: asked for other digits, the same pictures hardly ever agree.
    assert labelled.label_agreement(drawn[2.0], (asked + 1) % 10) <= 0.05
    for images in drawn.values():
        assert images.shape == (COUNT, 1, 8, 8) and images.abs().max() <= 1.0
        # Ten pictures of one digit differ, though less than all digits do.
        within = torch.stack([images[asked == label].std(0).mean() for label in range(10)])
        assert within.min() > 0.1 and within.mean() < images.std(0).mean()


def test_drawn_digits_are_near_real_ones(drawn):
    train, _ = digits_images()
    noise = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1.0, 1.0)
    chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:COUNT]]
    generated, real = digits_frechet(drawn[1.0]), digits_frechet(chosen)
    assert generated < real + 3.0
    assert generated < 0.25 * digits_frechet(torch.nn.functional.avg_pool2d(chosen, 3, 1, 1))
    assert generated < 0.1 * digits_frechet(noise)


def test_sampling_is_deterministic_and_blind_to_the_batch(dit):
    denoise, asked = labelled.labelled_denoiser(dit), torch.tensor([3, 7, 0, 10, 9])

    def draw(seed=7, batch=None, labels=asked):
        return labelled.sample_labelled_digits(denoise, labels, steps=4, guidance=3.0, seed=seed, batch=batch)

    whole = draw()
    assert torch.equal(whole, draw())
    torch.testing.assert_close(whole, draw(batch=2), atol=1e-4, rtol=0)
    assert not torch.equal(whole, draw(seed=8))
    other = draw(labels=torch.tensor([3, 6, 0, 10, 9]))
    differ = (whole - other).abs().amax((1, 2, 3)) > 0.1
    assert differ.tolist() == [False, True, False, False, False]


def test_no_class_is_what_an_unlabelled_sampler_draws(dit):
    none = torch.full((3,), labelled.NULL_LABEL)

    def unlabelled(sample, timestep, return_dict):
        return dit(sample, timestep, none, return_dict=return_dict)

    expected = sample_digits(denoiser(unlabelled), 3, steps=3, seed=1)
    denoise = labelled.labelled_denoiser(dit)
    assert torch.equal(labelled.sample_labelled_digits(denoise, none, steps=3, seed=1), expected)
    # w (none - none) is zero whatever w.
    drawn = labelled.sample_labelled_digits(denoise, none, steps=3, guidance=4.0, seed=1)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_is_one_call_and_its_formula(guidance):
    seen = []

    def denoise(sample, timestep, labels):
        seen.append((sample, timestep, labels))
        return (sample * (labels + 1.0).reshape(-1, 1, 1, 1)).numpy()

    labels = torch.tensor([4, 0])
    sample, timestep = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 6])
    noise = torch.as_tensor(labelled.guided(denoise, labels, guidance)(sample, timestep))
    none, asked = 11.0 * sample, sample * torch.tensor([5.0, 1.0]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(noise, none + guidance * (asked - none))
    ((samples, timesteps, asked_labels),) = seen
    if guidance == 1.0:
        assert asked_labels.tolist() == [4, 0] and len(samples) == 2
        return
    assert asked_labels.tolist() == [10, 10, 4, 0] and timesteps.tolist() == [5, 6, 5, 6]
    assert torch.equal(samples, torch.cat([sample, sample]))


def test_sampling_refuses_labels_and_answers_that_make_no_sense():
    def half(sample, timestep, labels):
        return sample[: len(sample) // 2]

    for wrong in (torch.tensor([11]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor(3)):
        with pytest.raises(ValueError, match="labels must be int64"):
            labelled.sample_labelled_digits(half, wrong)
    with pytest.raises(ValueError, match=r"returned shape \[2, 1, 8, 8\] for 4 rows"):
        labelled.sample_labelled_digits(half, torch.tensor([1, 2]), guidance=2.0)
    with pytest.raises(ValueError, match="need count 0"):
        labelled.sample_labelled_digits(half, torch.empty(0, dtype=torch.int64))


def test_a_plan_and_an_onnx_session_stand_in_for_the_denoiser(dit, tmp_path):
    program = capture(*load_builtin("digits-dit"))
    asked = torch.tensor([2, 5, 8])

    def draw(model):
        denoise = labelled.labelled_denoiser(model)
        return labelled.sample_labelled_digits(denoise, asked, steps=6, guidance=2.0, seed=5)

    expected = draw(dit)
    full = gw.Pipeline([gw.InsertLayerCache(reuse=((),) * 6)])(program).plan
    kept = gw.Pipeline([gw.InsertLayerCache(interval_steps=2)])(program).plan
    # Six steps magnify a rounding error of about 1e-6 of each prediction.
    torch.testing.assert_close(draw(full.module()), expected, atol=1e-3, rtol=0)
    cached = draw(kept.module())
    assert 1e-3 < (cached - expected).abs().max() and labelled.label_agreement(cached, asked) == 1.0
    gw.export_onnx(program, tmp_path)
    runner = gw.OnnxRunner(tmp_path, providers=["cpu"])

    def session(sample, timestep, labels):
        return runner(sample, timestep, labels)[0].numpy()

    drawn = labelled.sample_labelled_digits(session, asked, steps=6, guidance=2.0, seed=5)
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=0)


def test_denoising_loss_is_low_on_unseen_digits_and_lower_with_the_right_label(dit):
    (_, images), (_, labels) = digits_images(), digits_labels()
    with torch.no_grad():
        right = labelled.labelled_loss(dit, images, labels)
        assert torch.equal(right, labelled.labelled_loss(dit, images, labels))
        none = labelled.labelled_loss(dit, images, torch.full_like(labels, labelled.NULL_LABEL))
        wrong = labelled.labelled_loss(dit, images, (labels + 1) % 10)
        zero = labelled.labelled_loss(lambda sample, *_, return_dict: (0.0 * sample,), images, labels)
    assert right < none < wrong < 0.5 and right < 0.16
    assert zero.item() == pytest.approx(1.0, abs=0.03)


def test_calibration_repeats_has_the_labels_of_its_digits_and_gives_gradients(dit):
    loss, batches, split = labelled.calibration(count=2, batch=8, seed=5)
    _, again, _ = labelled.calibration(count=2, batch=8, seed=5)
    train, labels = digits_images()[0], digits_labels()[0]
    for batch, same in zip(batches, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
        # Clean digits come back from sample and noise, and are found among the real ones with their label.
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        keep = DDPMScheduler(**SCHEDULE).alphas_cumprod[batch.timestep].reshape(-1, 1, 1, 1)
        clean = (batch.sample - (1 - keep).sqrt() * batch.noise) / keep.sqrt()
        sure = keep.flatten() > 0.01
        found = (train.unsqueeze(0) - clean[sure].unsqueeze(1)).square().sum((2, 3, 4)).argmin(1)
        assert sure.sum() >= 6 and torch.equal(labels[found], batch.labels[sure])
    parts = split(batches[0])
    assert len(parts) == 8 and torch.equal(torch.cat([part.labels for part in parts]), batches[0].labels)
    weight = dit.pos_embed.proj.weight
    (gradient,) = torch.autograd.grad(loss(dit, batches[0]), weight)
    assert gradient.shape == weight.shape and gradient.abs().sum() > 0


def test_samples_are_drawn_from_the_same_noise_and_judged(dit, tmp_path):
    def grey(sample, timestep, labels, return_dict):
        return (sample,)

    program = capture(*load_builtin("digits-dit"))
    steps = []
    draw = labelled.samples(count=20, steps=6, shown=4)
    drawn = draw(program, {"original, X": dit, "result, X": grey}, tmp_path, lambda *step: steps.append(step))
    first, second = (drawn.models[label] for label in ("original, X", "result, X"))
    assert first.score is not None and second.score is not None
    assert drawn.score == "Frechet distance" and first.score < 0.5 * second.score
    rates = [float(rate) for rate in re.findall(r"([\d.]+)% by", drawn.note)]
    assert len(rates) == 2 and rates[0] >= 90 > 50 > rates[1]
    assert (tmp_path / first.file).read_bytes().startswith(b"\x89PNG")
    assert steps[-1] == ("draw digits (result, X)", 6, 6)


def test_samples_of_another_kind_of_model_or_too_few_are_refused(tmp_path):
    for other in ("digits-ddpm", "digits-classifier"):
        with pytest.raises(PreconditionError, match="leave `samples` out of the recipe"):
            labelled.samples()(capture(*load_builtin(other)), {}, tmp_path, lambda *step: None)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        labelled.samples(steps=0)
