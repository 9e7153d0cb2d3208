"""The trained models that ship with the package, and the real digits that judge them.

Three models trained on scikit-learn's handwritten digits (1797 scans of 8x8 pixels) live beside this file, each
as a folder of ``config.json``, ``model.safetensors`` and ``training.json`` (how it was made, and its measured
quality):

* ``digits-ddpm``: a diffusers ``UNet2DModel`` that predicts the noise in a noisy digit;
* ``digits-dit``: a diffusers ``DiTTransformer2DModel`` that does so for a digit that was asked for;
* ``digits-classifier``: a `DigitClassifier`, whose 64 features give a Frechet distance for digits.

They let every pass be judged on a trained network without a download: damage done to random weights cannot
be told from noise, damage done to these shows in the pictures. ``tools/train_digits.py`` makes them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...graph.errors import unknown

PREFIX = "builtin:"
FOLDER = Path(__file__).resolve().parent

_Module = TypeVar("_Module", bound=nn.Module)

# Names that `load_builtin` knows; on a command line they are written ``builtin:NAME``.
BUILTIN: tuple[str, ...] = ("digits-ddpm", "digits-dit", "digits-classifier")

HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 0
EXAMPLE_SEED = 0
EXAMPLE_BATCH = 2

# Of digits; ``digits-dit`` takes this label as that of no class.
CLASSES = 10


class DigitClassifier(nn.Module):
    """Three convolutions with batch norm, one hidden layer of features, ten class scores.

    Args:
        channels: Output channels of the three 3x3 convolutions.
        features: Width of the penultimate layer, the one that a Frechet distance compares.
        classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 64), features: int = 64, classes: int = 10) -> None:
        super().__init__()
        first, second, third = channels
        self.config = {"channels": list(channels), "features": features, "classes": classes}
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(third)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(third * 2 * 2, features)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate activations.

        Args:
            images: ``[n, 1, 8, 8]`` in [-1, 1].

        Returns:
            ``[n, features]``, not negative (it follows a ReLU).
        """
        x = torch.relu(self.norm1(self.conv1(images)))
        x = self.pool(torch.relu(self.norm2(self.conv2(x))))
        x = self.pool(torch.relu(self.norm3(self.conv3(x))))
        return torch.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (logits) ``[n, classes]`` of images ``[n, 1, 8, 8]`` in [-1, 1]."""
        return self.head(self.dropout(self.features(images)))


def builtin_folder(name: str) -> Path:
    """Return the folder of a built-in model, which holds its ``config.json`` and ``model.safetensors``.

    Args:
        name: One of `BUILTIN`, with or without the ``builtin:`` prefix.

    Raises:
        ValueError: There is no such model; the message lists the known names and the nearest one.
    """
    short = name.removeprefix(PREFIX)
    if short in BUILTIN:
        return FOLDER / short
    raise ValueError(unknown("unknown built-in model", short, BUILTIN))


def load_builtin(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Load a built-in model with inputs to trace or export it.

    The global random state is left as it was, though building a module draws initial weights.

    Args:
        name: One of `BUILTIN`, with or without the ``builtin:`` prefix.

    Returns:
        ``(module, args, kwargs)`` with the module in eval mode. For ``digits-ddpm``, args are a sample
        ``[2, 1, 8, 8]`` float32 and a timestep ``[2]`` int64 (0 to 999), and kwargs
        ``{"return_dict": False}``, so that it returns a one-tuple with the predicted noise. For
        ``digits-dit``, args have class labels ``[2]`` int64 too (0 to 9, 10 for no class). For
        ``digits-classifier``, args are images ``[2, 1, 8, 8]`` and kwargs are empty.

    Raises:
        ValueError: There is no such model.
        ImportError: A denoiser was asked for and diffusers is not installed.
    """
    folder = builtin_folder(name)
    generator = torch.Generator().manual_seed(EXAMPLE_SEED)
    sample = torch.randn(EXAMPLE_BATCH, 1, 8, 8, generator=generator)
    if folder.name == "digits-classifier":
        return digits_classifier(), (sample.clamp(-1.0, 1.0),), {}
    inputs = [sample, torch.randint(0, 1000, (EXAMPLE_BATCH,), generator=generator)]
    if folder.name == "digits-dit":
        inputs.append(torch.randint(0, CLASSES, (EXAMPLE_BATCH,), generator=generator))
    return _denoiser(folder), tuple(inputs), {"return_dict": False}


def digits_classifier() -> DigitClassifier:
    """Return the trained digit classifier, in eval mode; ``training.json`` beside its weights has its accuracy."""
    folder = builtin_folder("digits-classifier")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        model = DigitClassifier(**config)
    return _with_weights(model, folder)


def digits_images() -> tuple[Tensor, Tensor]:
    """Return real handwritten digits under the fixed split that the models were trained with.

    Returns:
        ``(train, held_out)``: float32 tensors ``[1438, 1, 8, 8]`` and ``[359, 1, 8, 8]`` in [-1, 1], where
        -1 is blank paper and 1 is full ink.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra that brings it.
    """
    images, _ = _digits()
    train, held_out = _split(len(images))
    return images[train], images[held_out]


def digits_labels() -> tuple[Tensor, Tensor]:
    """Return labels 0 to 9 in the order of `digits_images`: int64 tensors ``[1438]`` and ``[359]``.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra that brings it.
    """
    _, labels = _digits()
    train, held_out = _split(len(labels))
    return labels[train], labels[held_out]


def _digits() -> tuple[Tensor, Tensor]:
    """Return all digits ``[1797, 1, 8, 8]`` in [-1, 1] and their labels ``[1797]``, in the data set's own order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the handwritten digits come with scikit-learn, which is not installed: run `pip install graphwright[digits]`"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    # Ink is stored as 0 to 16, so that 8 is the middle grey.
    images = torch.as_tensor(pixels, dtype=torch.float32).div(8.0).sub(1.0).reshape(-1, 1, 8, 8)
    return images, torch.as_tensor(labels, dtype=torch.int64)


def _split(count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the train and held-out digits; the models' reported quality holds for this split alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = round(count * HELD_OUT_FRACTION)
    return order[held_out:], order[:held_out]


def _denoiser(folder: Path) -> nn.Module:
    """Build the diffusers model of a folder, in eval mode."""
    try:
        # Here, since importing diffusers takes seconds.
        if folder.name == "digits-dit":
            from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel as Denoiser
        else:
            from diffusers.models.unets.unet_2d import UNet2DModel as Denoiser
    except ImportError as error:
        raise ImportError(
            f"builtin:{folder.name} is a diffusers model and diffusers is not installed: run `pip install graphwright[hf]`"
        ) from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        model = Denoiser.from_config(config)
    assert isinstance(model, nn.Module)  # it is a tuple only where unused arguments are asked for
    return _with_weights(model, folder)


def _with_weights(model: _Module, folder: Path) -> _Module:
    """Load ``model.safetensors`` strictly and sets eval mode."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()
