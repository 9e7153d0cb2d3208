"""Full-size architectures from their configurations, with random weights, as the benchmarks run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Subject(NamedTuple):
    """A model with inputs, and what a peer has to be told about it: heads per attention, layers to leave alone."""

    model: nn.Module
    inputs: dict[str, Any]
    heads: int
    ignored: tuple[str, ...]


def vit() -> Subject:
    """ViT-B/16, 224 px."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(num_labels=1000))  # pyright: ignore[reportCallIssue]
    return Subject(model.eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}, 12, ("classifier",))


def convnext() -> Subject:
    """ConvNeXt-T, 224 px."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    model = ConvNextForImageClassification(ConvNextConfig(num_labels=1000))  # pyright: ignore[reportCallIssue]
    return Subject(model.eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}, 0, ("classifier",))


def resnet() -> Subject:
    """ResNet-50, 224 px."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))  # pyright: ignore[reportCallIssue]
    return Subject(model.eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}, 0, ("classifier.1",))


def llama() -> Subject:
    """12 layers of width 512, 8 heads, 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    tokens = torch.randint(0, 32000, (1, 64))
    return Subject(LlamaForCausalLM(config).eval(), {"input_ids": tokens, "use_cache": False}, 8, ("lm_head",))


def bert() -> Subject:
    """BERT-base, 64 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig())
    return Subject(model.eval(), {"input_ids": torch.randint(0, 30000, (1, 64))}, 12, ("classifier",))


def ddpm() -> Subject:
    """UNet2DModel in the layout of DDPM for CIFAR-10."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    model = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    inputs = {"sample": torch.randn(1, 3, 32, 32), "timestep": torch.tensor([10]), "return_dict": False}
    return Subject(model.eval(), inputs, 0, ("conv_out",))


def sd15() -> Subject:
    """The UNet of Stable Diffusion 1.5, 16x16 latents."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    inputs = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
        "return_dict": False,
    }
    return Subject(model.eval(), inputs, 8, ("conv_out",))


ARCHITECTURES: dict[str, Callable[[], Subject]] = {
    "ResNet-50": resnet,
    "ConvNeXt-T": convnext,
    "ViT-B/16": vit,
    "BERT-base": bert,
    "Llama 12x512": llama,
    "UNet2D DDPM": ddpm,
    "SD 1.5 UNet": sd15,
}
