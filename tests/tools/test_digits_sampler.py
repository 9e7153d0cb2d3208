"""The sampler draws the same pictures from the same noise, calls with one batch size, and refuses nonsense."""

from __future__ import annotations

import json

import pytest
import torch

from graphwright.frontends.builtin import builtin_folder, load_builtin
from graphwright.tools.digits_sampler import SCHEDULE, denoiser, sample_digits


@pytest.fixture(scope="module")
def unet():
    return load_builtin("digits-ddpm")[0]


def test_sampling_is_deterministic_and_blind_to_the_batch(unet):
    denoise = denoiser(unet)
    whole = sample_digits(denoise, 5, steps=4, seed=7)
    assert torch.equal(whole, sample_digits(denoise, 5, steps=4, seed=7))
    torch.testing.assert_close(whole, sample_digits(denoise, 5, steps=4, seed=7, batch=2), atol=1e-4, rtol=0)
    assert not torch.equal(whole, sample_digits(denoise, 5, steps=4, seed=8))
    assert whole.shape == (5, 1, 8, 8) and whole.abs().max() <= 1.0


def test_every_call_has_the_asked_batch_and_may_answer_with_arrays():
    seen = []

    def denoise(sample, timestep):
        seen.append((tuple(sample.shape), tuple(timestep.shape), timestep.dtype))
        return sample.numpy() * 0.5

    assert sample_digits(denoise, 3, steps=2, batch=2).shape == (3, 1, 8, 8)
    assert seen == [((2, 1, 8, 8), (2,), torch.int64)] * 4


def test_sampling_refuses_what_makes_no_sense():
    for count, steps, batch in ((0, 1, 1), (1, 0, 1), (1, 1001, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="need count"):
            sample_digits(lambda sample, timestep: sample, count, steps=steps, batch=batch)
    with pytest.raises(ValueError, match="returned shape"):
        sample_digits(lambda sample, timestep: sample[:, 0], 1, steps=1)


@pytest.mark.parametrize("name", ["digits-ddpm", "digits-dit"])
def test_schedule_is_the_shipped_one(name):
    path = builtin_folder(name) / "scheduler_config.json"
    shipped = json.loads(path.read_text(encoding="utf-8"))
    assert {key: shipped[key] for key in SCHEDULE} == SCHEDULE
