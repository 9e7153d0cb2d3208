"""Published pruned networks: how to build them, the settings they were pruned with, and the printed sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...frontends.capture import capture
from ...graph.program import Program
from ...passes.base import Pass, Pipeline
from ...passes.remove_blocks import RemoveBlocks
from ...passes.remove_channels import RemoveChannels
from .cache_models import DDPM_CIFAR, DDPM_LSUN, unconditional

DIFF, ISOMORPHIC, DEPGRAPH = "arXiv 2305.10924", "arXiv 2407.04616", "arXiv 2301.12900, its repository"
CELEBA: dict[str, Any] = DDPM_CIFAR | {
    "sample_size": 64,
    "block_out_channels": (128, 256, 256, 256, 512),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}


@dataclass(frozen=True)
class Setting:
    """One published pruned network.

    Attributes:
        name: As published.
        options: Of `RemoveChannels`; None is the network as it is.
        parameters: As printed, in millions; empty if not printed.
        macs: As printed, in 10^9; empty if not printed.
        note: Why it cannot be equal, or how it is.
        seeds: Of random scores, where the counts depend on them.
        blocks: Of `RemoveBlocks`, which then comes after `RemoveChannels`; None takes none away.
    """

    name: str
    options: Mapping[str, Any] | None
    parameters: str = ""
    macs: str = ""
    note: str = ""
    seeds: int = 1
    blocks: Mapping[str, Any] | None = None

    def at_random(self, program: Program, seed: int) -> Program:
        """Return what is left of ``program`` with random scores."""
        if self.options is None:
            return program
        steps: list[Pass] = [RemoveChannels(criterion="random", seed=seed, **self.options)]
        if self.blocks is not None:
            steps.append(RemoveBlocks(criterion="random", seed=seed, **self.blocks))
        return Pipeline(steps)(program).program


@dataclass(frozen=True)
class Network:
    """A network and what is published of it.

    Attributes:
        source: Paper.
        name: Of the network.
        build: Makes it.
        shape: Of its input.
        settings: What is published.
        timestep: Whether it is a denoiser.
        timm_attention: Whether its attention is timm's, which the published counts see into (`published_macs`).
        layer_norms: Whether the published counts have layer norms in them.
        weights: Whether it has random weights, whose magnitudes are the scores where the counts depend on these: then
            the widths of a layer depend on one another, as they do with real scores. Else it is on the meta device.
    """

    source: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    settings: tuple[Setting, ...]
    timestep: bool = False
    timm_attention: bool = False
    layer_norms: bool = True
    weights: bool = False

    def program(self) -> Program:
        """Return the captured network."""
        device = "cpu" if self.weights else "meta"
        with torch.device(device):
            model = self.build().eval()
        inputs = [torch.rand(self.shape, device=device)]
        if self.timestep:
            inputs.append(torch.rand(1, device=device))
        return capture(model, tuple(inputs), dynamic={})


def _of_library(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**{"num_labels": 1000, **options}))

    return build


def _deit(width: int) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return _of_library("DeiTForImageClassificationWithTeacher", "DeiTConfig", **sizes)


def _diff(ratio: float) -> dict[str, Any]:
    return {"ratio": ratio, "head_dim_ratio": ratio, "rounding": "floor-removed"}


def _isomorphic(ratio: float, heads: float = 0.0, head_dims: float = 0.0) -> dict[str, Any]:
    return {
        "ratio": ratio,
        "head_ratio": heads,
        "head_dim_ratio": head_dims,
        "round_to": 2,
        "rounding": "floor-kept",
        "scope": "isomorphic",
        "normaliser": "none",
    }


BY_SCORES = "real scores move channels between the stages of a class; they need the published weights"
CUT = "printed cut, not rounded"
SEEDS = 20
# The blocks of ConvNeXt's third stage, 27 in the base size.
STAGE_3 = "convnext.encoder.stages.2"
IMAGE = (1, 3, 224, 224)


def _bottlenecks(*depths: int, classes: int = 1000) -> Callable[[], nn.Module]:
    return _of_library("ResNetForImageClassification", "ResNetConfig", depths=list(depths), num_labels=classes)


def _deit_settings(*settings: Setting) -> dict[str, Any]:
    return {"shape": IMAGE, "timm_attention": True, "weights": True, "settings": settings}


# Uniform ratios of a ResNet-50, parameters and multiply-accumulates: the table of latencies in the repository of DepGraph.
UNIFORM = (
    (0.1, "20.63", "3.31"),
    (0.2, "16.27", "2.63"),
    (0.3, "12.46", "2.02"),
    (0.4, "9.14", "1.50"),
    (0.5, "6.41", "1.07"),
    (0.6, "4.07", "0.67"),
    (0.7, "2.28", "0.39"),
    (0.8, "1.01", "0.18"),
    (0.9, "0.25", "0.05"),
)

NETWORKS: tuple[Network, ...] = (
    Network(
        DIFF,
        "DDPM CIFAR-10",
        lambda: unconditional(DDPM_CIFAR),
        (1, 3, 32, 32),
        (
            Setting("dense", None, "35.7", "6.1"),
            Setting("0.2", _diff(0.2), "27.50", "5.11"),
            Setting("0.3", _diff(0.3), "19.8", "3.4"),
            Setting("0.4", _diff(0.4), "14.32", "2.74"),
            Setting("0.6", _diff(0.6), "8.59", "1.49"),
        ),
        timestep=True,
    ),
    Network(
        DIFF,
        "DDPM CelebA-HQ 64",
        lambda: unconditional(CELEBA),
        (1, 3, 64, 64),
        (Setting("dense", None, "78.7", "23.9"), Setting("0.3", _diff(0.3), "43.7", "13.3")),
        timestep=True,
    ),
    Network(
        DIFF,
        "DDPM LSUN 256",
        lambda: unconditional(DDPM_LSUN),
        (1, 3, 256, 256),
        (
            Setting("dense", None, "113.7", "248.7"),
            Setting("0.3", _diff(0.3), "", "138.8", "as arXiv 2312.00858 gives it for the same network"),
            Setting(
                "printed",
                _diff(0.3),
                "46.5",
                "100.7",
                "no ratio gives this pair: 0.38 leaves 45.2 M and 126.9 G, 0.5 leaves 28.5 M and 62.4 G",
            ),
        ),
        timestep=True,
    ),
    Network(
        ISOMORPHIC,
        "DeiT-B distilled",
        _deit(768),
        **_deit_settings(
            Setting("dense", None, "87.34", "17.69"),
            Setting("4.2G", _isomorphic(0.5, 0.5, 0.25), "20.69", "4.16", seeds=SEEDS),
            Setting("2.6G", _isomorphic(0.6, 0.6, 0.3), "13.07", "2.62", seeds=SEEDS),
            Setting(
                "1.2G, from B",
                _isomorphic(0.75, 0.75, 0.1),
                "5.74",
                "1.21",
                "the paper's start, at other ratios",
                SEEDS,
            ),
        ),
    ),
    Network(
        ISOMORPHIC,
        "DeiT-S distilled",
        _deit(384),
        **_deit_settings(
            Setting("dense", None, "22.44", "4.64"),
            Setting("1.2G", _isomorphic(0.5, 0.5, 0.1), "5.74", "1.21", seeds=SEEDS),
        ),
    ),
    Network(
        ISOMORPHIC,
        "DeiT-T distilled",
        _deit(192),
        **_deit_settings(
            Setting("dense", None, "5.91", "1.27"),
            Setting("0.6G", _isomorphic(0.25, 0.3, 0.3), "3.08", "0.62", seeds=SEEDS),
        ),
    ),
    Network(
        ISOMORPHIC,
        "ConvNeXt-B",
        _of_library(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            depths=[3, 3, 27, 3],
            hidden_sizes=[128, 256, 512, 1024],
        ),
        IMAGE,
        (
            Setting("8.5G", _isomorphic(0.26), "47.36", "8.48", BY_SCORES, 3),
            Setting("4.2G", _isomorphic(0.25), "25.32", "4.19", BY_SCORES, 3, {"blocks": (STAGE_3,), "count": 18}),
        ),
    ),
    Network(
        ISOMORPHIC,
        "ResNet-50",
        _bottlenecks(3, 4, 6, 3),
        IMAGE,
        (
            Setting("dense", None, "25.56"),
            Setting("dense", None, "", "4.13", "the counter's own repository prints 4.12 for this network"),
            Setting("2.0G", _isomorphic(0.26), "15.05", "2.06", BY_SCORES, 3),
        ),
    ),
    Network(
        ISOMORPHIC,
        "ResNet-101",
        _bottlenecks(3, 4, 23, 3),
        IMAGE,
        (
            Setting("dense", None, "44.55", "7.85"),
            Setting("4.5G", _isomorphic(0.22), "29.14", "4.48", BY_SCORES, 3),
            Setting("3.8G", _isomorphic(0.28), "24.87", "3.85", BY_SCORES, 3),
        ),
    ),
    Network(
        ISOMORPHIC,
        "ResNet-152",
        _bottlenecks(3, 8, 36, 3),
        IMAGE,
        (Setting("4.0G", _isomorphic(0.4), "", "4.0", BY_SCORES, 3),),
    ),
    Network(
        ISOMORPHIC,
        "MobileNetV2",
        _of_library("MobileNetV2ForImageClassification", "MobileNetV2Config"),
        IMAGE,
        (Setting("0.15G", _isomorphic(0.27), "", "0.15", BY_SCORES, 3),),
    ),
    Network(
        DEPGRAPH,
        "ViT-B/16",
        _of_library("ViTForImageClassification", "ViTConfig"),
        IMAGE,
        (
            Setting("dense", None, "86.57", "17.59"),
            Setting("uniform 0.5", {"ratio": 0.5, "head_dim_ratio": 0.5}, "22.05", "4.61"),
        ),
        timm_attention=True,
        layer_norms=False,
    ),
    Network(DEPGRAPH, "ResNet-50", _bottlenecks(3, 4, 6, 3), IMAGE, (Setting("dense", None, "25.56", "4.12"),)),
    *(
        Network(
            DEPGRAPH,
            "ResNet-50",
            _bottlenecks(3, 4, 6, 3, classes=round(1000 * (1 - ratio))),
            IMAGE,
            (
                Setting(
                    f"uniform {ratio}",
                    {"ratio": ratio, "round_to": 2, "rounding": "floor-kept"},
                    parameters,
                    macs,
                    "built with the classes that the published network had left",
                ),
            ),
        )
        for ratio, parameters, macs in UNIFORM
    ),
)
