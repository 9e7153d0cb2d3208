"""The script that trains the built-in models repeats itself and writes folders that load."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from graphwright.frontends.builtin import builtin_folder
from graphwright.tools import train_digits, train_dit
from graphwright.tools.digits_labels import NULL_LABEL
from graphwright.tools.training import Settings, fit_denoiser, save, save_denoiser

SHORT = Settings(steps=2, batch=4, rate=1e-3, decay=0.5, seed=4)


def require_like_shipped(made, name):
    shipped = builtin_folder(name)
    assert {path.name for path in made.iterdir()} == {path.name for path in shipped.iterdir()}
    written, expected = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (made, shipped))
    assert written == expected


@pytest.mark.parametrize(
    ("train", "name"), [(train_digits.train_denoiser, "digits-ddpm"), (train_dit.train_dit, "digits-dit")]
)
def test_denoisers_train_the_same_again_and_are_written_like_the_shipped_ones(train, name, tmp_path):
    with torch.random.fork_rng(devices=[]):
        (first, record), (again, _) = train(SHORT), train(SHORT)
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in first.state_dict().items())
    assert record["steps"] == 2 and record["train_loss"] > 0
    save_denoiser(first, tmp_path, record)
    require_like_shipped(tmp_path, name)


def test_classifier_is_written_like_the_shipped_one(tmp_path):
    with torch.random.fork_rng(devices=[]):
        judge, record = train_digits.train_classifier(steps=2, batch=4, rate=1e-3, seed=4)
    assert 0.0 <= record["held_out_accuracy"] <= 1.0
    save(judge, tmp_path, judge.config, record)
    require_like_shipped(tmp_path, "digits-classifier")


def test_every_block_sees_the_same_dropped_labels_one_in_ten(monkeypatch):
    seen = []

    def fit(build, predict, told, settings):
        model = build().train()
        for name, part in model.named_modules():
            if name.endswith("class_embedder.embedding_table"):
                part.register_forward_hook(lambda _, inputs, output: seen[-1].append(inputs[0]))
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            seen.append([])
            timestep = torch.zeros(100, dtype=torch.int64)
            predict(model, torch.zeros(100, 1, 8, 8), timestep, torch.arange(100), generator)
        return model, {}

    monkeypatch.setattr(train_dit, "fit_denoiser", fit)
    with torch.random.fork_rng(devices=[]):
        train_dit.train_dit(SHORT)
    assert len(seen) == 10 and all(len(calls) == train_dit.DIT["num_layers"] + 1 for calls in seen)
    for first, *others in seen:
        assert all(torch.equal(first, other) for other in others)
    dropped = sum(int((calls[0] == NULL_LABEL).sum()) for calls in seen)
    assert 72 <= dropped <= 128  # 100 of 1000 are expected, with a standard deviation of 9.5


def test_averaged_weights_follow_the_trained_ones():
    trained = []

    def build():
        trained.append(nn.Conv2d(1, 1, 1))
        return trained[-1]

    def predict(model, sample, timestep, chosen, generator):
        assert len(timestep) == len(chosen) == 4
        return model(sample)

    with torch.random.fork_rng(devices=[]):
        averaged, _ = fit_denoiser(build, predict, lambda model: "", Settings(1, 4, 1e-2, 0.999, 0))
        torch.manual_seed(0)
        start = nn.Conv2d(1, 1, 1)
    assert not averaged.training and averaged is not trained[0]
    assert not torch.equal(trained[0].weight, start.weight)
    # The decay of the first step is 0.1, not 0.999.
    torch.testing.assert_close(averaged.weight, 0.1 * start.weight + 0.9 * trained[0].weight)


def test_training_script_refuses_weights_too_big_to_ship(tmp_path):
    with pytest.raises(ValueError, match="more than"):
        save(nn.Linear(1000, 1000), tmp_path, {}, {})
