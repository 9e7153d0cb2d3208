"""Denoisers that caches are measured on: published configurations, and a tiny pipeline of Stable Diffusion's kind."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

# google/ddpm-cifar10-32 and google/ddpm-church-256 (bedroom-256 is the same): UNet2DModel.
DDPM_CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DDPM_LSUN: dict[str, Any] = DDPM_CIFAR | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
# LDM-4-G, class-conditional on ImageNet 256: model_channels 192, channel_mult 1, 2, 3, 5, two residual blocks a level,
# a spatial transformer of depth 1 at levels 1 to 3, context 512, one token. As UNet2DConditionModel.
LDM_4_G: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (192, 384, 576, 960),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "cross_attention_dim": 512,
    "attention_head_dim": 1,  # diffusers takes it for the number of heads in this class
}
# Stable Diffusion 1.5.
SD_15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# The layout of Stable Diffusion 1.5 at a quarter of its widths.
SD_QUARTER: dict[str, Any] = SD_15 | {"block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16}
# Stable Diffusion 2.1.
SD_21: dict[str, Any] = SD_15 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
# Two levels of small widths, 6 branches.
TINY_SD: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 2,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
# DiT-S/2 (arXiv 2212.09748): 12 blocks, 384 wide; of latents 32x32, so 256 tokens.
DIT_S_2: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 12,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "num_embeds_ada_norm": 1000,
}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unconditional(config: dict[str, Any]) -> nn.Module:
    """Return a ``UNet2DModel`` with random weights, in eval mode."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel(**config).eval()


def conditional(config: dict[str, Any]) -> nn.Module:
    """Return a ``UNet2DConditionModel`` with random weights, in eval mode."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**config).eval()


def transformer(config: dict[str, Any]) -> nn.Module:
    """Return a ``DiTTransformer2DModel`` with random weights, in eval mode."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return DiTTransformer2DModel(**config).eval()


def ddim(steps: int, device: torch.device | str = "cpu") -> Any:
    """Return Stable Diffusion's deterministic sampler, with its times set."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def tiny_pipeline(kind: str = "StableDiffusionPipeline", scheduler: str = "DDIMScheduler", **config: Any) -> Any:
    """Return a pipeline of Stable Diffusion's kind without a text encoder: `draw` makes up embeddings.

    Args:
        kind: Class name in diffusers.
        scheduler: Class name in diffusers.
        config: Of the U-Net, beyond `TINY_SD`.
    """
    diffusers: Any = import_module("diffusers")
    torch.manual_seed(0)
    unet = conditional(TINY_SD | config)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    pipe = getattr(diffusers, kind)(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=getattr(diffusers, scheduler)(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, seed: int = 0, steps: int = 6, **options: Any) -> Tensor:
    """Draw one latent ``[1, 4, 8, 8]`` with guidance from a `tiny_pipeline`.

    Args:
        pipe: The pipeline.
        seed: Of embeddings and noise.
        steps: Of the sampler.
        options: Further arguments of the pipeline's call.
    """
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (torch.randn(1, 5, 12, generator=generator) for _ in range(2))
    size = {} if "image" in options else {"height": 16, "width": 16}
    return pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **size,
        **options,
    ).images


def switch_guidance_off(step: int) -> dict[str, Any]:
    """Return options of `draw` that switch guidance off after a step, as pipelines' callbacks do."""

    def callback(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
