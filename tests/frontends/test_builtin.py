"""The shipped models load as they are, and the classifier still knows its digits."""

from __future__ import annotations

import builtins
import itertools
import json

import pytest
import torch

from graphwright.frontends.builtin import (
    BUILTIN,
    DigitClassifier,
    builtin_folder,
    digits_classifier,
    digits_images,
    digits_labels,
    load_builtin,
)


@pytest.mark.parametrize("name", BUILTIN)
def test_loads_in_eval_mode_and_runs_on_its_example(name):
    module, args, kwargs = load_builtin(name)
    assert not any(child.training for child in module.modules())
    with torch.no_grad():
        output = module(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    assert output.shape == ((2, 10) if name == "digits-classifier" else (2, 1, 8, 8))
    assert output.isfinite().all()


@pytest.mark.parametrize("name", ["digits-ddpm", "digits-dit"])
def test_denoiser_example_is_what_an_exporter_needs(name):
    _, (sample, timestep, *labels), kwargs = load_builtin(f"builtin:{name}")
    assert sample.shape == (2, 1, 8, 8) and sample.dtype == torch.float32
    assert timestep.shape == (2,) and timestep.dtype == torch.int64
    assert [(label.shape, label.dtype) for label in labels] == [((2,), torch.int64)] * (name == "digits-dit")
    assert kwargs == {"return_dict": False}


def test_transformer_minds_its_labels_and_takes_ten_for_none():
    module, (sample, timestep, _), kwargs = load_builtin("digits-dit")
    three, eight, none = (torch.full((2,), label) for label in (3, 8, 10))
    with torch.no_grad():
        found = [module(sample, timestep, labels, **kwargs)[0] for labels in (three, eight, none, three)]
    assert torch.equal(found[0], found[3])
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(found[:3], 2))
    with pytest.raises(IndexError):  # ten classes and the one that is none
        module(sample, timestep, none + 1, **kwargs)


@pytest.mark.parametrize("name", ["digits-ddpm", "digits-dit"])
def test_diffusers_itself_builds_the_denoiser_from_the_folder(name):
    import diffusers
    from safetensors.torch import load_file

    folder = builtin_folder(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    module = getattr(diffusers, config["_class_name"]).from_config(config)
    weights = load_file(folder / "model.safetensors")
    module.load_state_dict(weights, strict=True)
    shipped, _, _ = load_builtin(name)
    assert type(shipped) is type(module)
    for key, tensor in shipped.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


@pytest.mark.parametrize("name", BUILTIN)
def test_weights_are_small_enough_to_ship_and_finite(name):
    folder = builtin_folder(name)
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    module, _, _ = load_builtin(name)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", BUILTIN)
def test_loading_is_deterministic_and_leaves_the_random_state(name):
    before = torch.random.get_rng_state()
    (first, first_args, _), (second, second_args, _) = load_builtin(name), load_builtin(name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first_args, second_args, strict=True))
    assert all(torch.equal(t, second.state_dict()[key]) for key, t in first.state_dict().items())


def test_classifier_knows_held_out_digits():
    _, images = digits_images()
    _, labels = digits_labels()
    with torch.no_grad():
        accuracy = (digits_classifier()(images).argmax(1) == labels).double().mean().item()
    assert accuracy >= 0.97
    record = json.loads((builtin_folder("digits-classifier") / "training.json").read_text(encoding="utf-8"))
    assert accuracy == pytest.approx(record["held_out_accuracy"], abs=0.003)


def test_classifier_features_precede_its_scores():
    model = DigitClassifier(channels=(4, 4, 4), features=6, classes=3).eval()
    features = model.features(torch.zeros(5, 1, 8, 8))
    assert features.shape == (5, 6) and features.min() >= 0
    assert torch.equal(model.head(features), model(torch.zeros(5, 1, 8, 8)))


def test_split_is_fixed_disjoint_and_in_range():
    train, held_out = digits_images()
    labels, held_out_labels = digits_labels()
    assert train.shape == (1438, 1, 8, 8) and held_out.shape == (359, 1, 8, 8)
    assert len(labels) == 1438 and len(held_out_labels) == 359
    assert train.min() == -1.0 and train.max() == 1.0
    assert set(labels.tolist()) == set(held_out_labels.tolist()) == set(range(10))
    # No two scans are equal, so a shared picture would be a leak.
    assert not {t.numpy().tobytes() for t in train} & {t.numpy().tobytes() for t in held_out}
    assert all(torch.equal(a, b) for a, b in zip((train, held_out), digits_images(), strict=True))


@pytest.mark.parametrize(
    ("name", "near"),
    [("digit-ddpm", "digits-ddpm"), ("digits-clasifier", "digits-classifier"), ("digits-dti", "digits-dit")],
)
def test_unknown_name_is_told_the_nearest(name, near):
    with pytest.raises(ValueError) as error:
        load_builtin(f"builtin:{name}")
    assert f"did you mean '{near}'" in str(error.value)


def test_a_name_like_no_other_gets_no_guess():
    with pytest.raises(ValueError, match="known: digits-classifier, digits-ddpm, digits-dit$"):
        load_builtin("qqq")


@pytest.mark.parametrize(
    ("missing", "call", "extra"),
    [
        ("sklearn", digits_images, "digits"),
        ("diffusers", lambda: load_builtin("digits-ddpm"), "hf"),
        ("diffusers", lambda: load_builtin("digits-dit"), "hf"),
    ],
)
def test_missing_library_names_the_extra_to_install(monkeypatch, missing, call, extra):
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"pip install graphwright\[{extra}\]"):
        call()
