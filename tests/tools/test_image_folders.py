"""Pictures in folders of their class: what is read, what is refused, and a published recipe run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphwright.graph.errors import PreconditionError
from graphwright.passes.remove_blocks import RemoveBlocks
from graphwright.tools.bench.published_networks import NETWORKS
from graphwright.tools.image_folders import DEVIATION, MEAN, calibration
from graphwright.tools.recipe import load_recipe, shipped
from graphwright.tools.run import Runner

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of six pictures: plain red ones, wider than high, and plain green ones, higher than wide."""
    for label, (name, colour, size) in enumerate(
        (("b-red", (255, 0, 0), (60, 40)), ("c-green", (0, 255, 0), (30, 90)))
    ):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", size, colour).save(tmp_path / name / f"{label}{i}.png")
    (tmp_path / "c-green" / "notes.txt").write_text("no picture")
    return tmp_path


def test_batches_have_the_classes_of_the_folders_and_normalised_pixels(pictures: Path) -> None:
    _, batches, split = calibration(str(pictures), count=3, batch=4, size=32, scaled=36)
    assert len(batches) == 3
    found = [batch for batch in batches]
    assert sorted(torch.cat([b.labels for b in found]).tolist()) == [0] * 6 + [1] * 6
    for batch in found:
        assert batch.images.shape == (4, 3, 32, 32)
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            for channel in range(3):
                wanted = (float(channel == label) - MEAN[channel]) / DEVIATION[channel]
                torch.testing.assert_close(image[channel], torch.full((32, 32), wanted), atol=1e-5, rtol=0)
    again = calibration(str(pictures), count=3, batch=4, size=32, scaled=36)[1]
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(again, found, strict=True))
    assert [len(one.labels) for one in split(found[0])] == [1] * 4


def test_the_centre_is_cut_out_of_the_scaled_picture(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the middle of a picture twice as wide as high
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png")
    (batch,) = calibration(str(tmp_path), count=1, batch=1, size=40, scaled=40)[1]
    torch.testing.assert_close(
        batch.images[0, 0], torch.full((40, 40), (1 - MEAN[0]) / DEVIATION[0]), atol=1e-5, rtol=0
    )


def test_what_is_missing_is_said(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r"has 12 pictures, and 4 batches of 4 were asked for"):
        calibration(str(pictures), count=4, batch=4, size=8, scaled=8)
    with pytest.raises(PreconditionError, match="has no pictures in folders of their class"):
        calibration(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="scaled must be at least 224, got 200"):
        calibration(str(pictures), scaled=200)


PUBLISHED = {
    "deit-4.2g": ("DeiT-B distilled", "4.2G"),
    "deit-2.6g": ("DeiT-B distilled", "2.6G"),
    "deit-1.2g": ("DeiT-S distilled", "1.2G"),
    "deit-0.6g": ("DeiT-T distilled", "0.6G"),
    "convnext-8.5g": ("ConvNeXt-B", "8.5G"),
    "convnext-4.2g": ("ConvNeXt-B", "4.2G"),
    "resnet50-2.0g": ("ResNet-50", "2.0G"),
    "resnet101-4.5g": ("ResNet-101", "4.5G"),
    "resnet101-3.8g": ("ResNet-101", "3.8G"),
    "resnet152-4.0g": ("ResNet-152", "4.0G"),
}


def test_there_is_a_recipe_for_every_published_setting() -> None:
    assert {name for name in shipped() if name.startswith("isomorphic/")} == {
        f"isomorphic/{name}" for name in PUBLISHED
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_options_whose_sizes_are_compared_with_the_published_ones(name: str) -> None:
    recipe = load_recipe(f"isomorphic/{name}")
    network, setting = PUBLISHED[name]
    ((options, blocks),) = [
        (s.options, s.blocks)
        for n in NETWORKS
        for s in n.settings
        if (n.name, s.name) == (network, setting) and s.options
    ]
    step: Any = recipe.passes[0]
    # The scores are divided by their mean in the published scripts, which no size depends on much.
    assert {key: getattr(step, key) for key in options} == {**options, "normaliser": "mean"}
    assert step.criterion == "taylor"
    taken = [p for p in recipe.passes if isinstance(p, RemoveBlocks)]
    assert taken == ([] if blocks is None else [RemoveBlocks(criterion="taylor", **blocks)])
    batches = recipe.calibration.options  # pyright: ignore[reportOptionalMemberAccess]
    assert (batches["count"], batches["batch"]) == (100 if name.startswith(("resnet101", "resnet152")) else 50, 64)


def test_a_published_recipe_runs_on_a_small_network_of_the_kind(pictures: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=2,
    )
    torch.manual_seed(0)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "model")
    options = {"folder": str(pictures), "count": 2, "batch": 4, "size": 32, "scaled": 36}
    sets = [f"calibration.options.{key}={value}" for key, value in options.items()]
    recipe = load_recipe(
        "isomorphic/deit-4.2g", [f"model={tmp_path / 'model'}", "export.onnx=false", "measure=false", *sets]
    )
    outcome = Runner(recipe, tmp_path / "run")()
    assert not outcome.failures
    result = outcome["pass-1-remove-channels"].result
    stats = result["stats"]
    # The stream by itself, and both layers' heads, head dims, value dims and feed-forward widths.
    assert sorted(map(len, result["classes"])) == [1, 2, 2, 2, 2] and result["regrouped"] == []
    assert stats["calibration_samples_used"] == 2
    assert stats["parameters_after"] < 0.5 * stats["parameters_before"]
