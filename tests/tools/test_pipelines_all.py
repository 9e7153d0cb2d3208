"""Caches in one line on unmodified pipelines of every kind of denoiser: the same calls, no branches for a model.

What the programs compute is compared with the eager models elsewhere (`tests/passes/test_cache_architectures_*`). Here it is
that pipelines find what they ask of their denoiser, that runs are followed, and that nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.tools.bench.cache_models import TINY_SD, conditional
from graphwright.tools.zoo import ZOO

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

STEPS, TOKENS = 4, 6
Pipe = tuple[Any, Callable[[Any], Tensor]]


def diffusers(name: str, **options: Any) -> Any:
    return getattr(import_module("diffusers"), name)(**options)


def autoencoder(channels: int, levels: int = 2) -> Any:
    """Return one whose latents are 2 ** (levels - 1) times smaller."""
    return diffusers(
        "AutoencoderKL",
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def common() -> dict[str, Any]:
    return {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3), "output_type": "latent"}


def nothing(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def ddpm() -> Pipe:
    model = ZOO["unet2d"].build().model
    pipe = diffusers("DDPMPipeline", unet=model, scheduler=diffusers("DDIMScheduler"))
    options = {**common(), "output_type": "np"}
    return pipe, lambda p: torch.as_tensor(p(batch_size=2, **options | {"generator": common()["generator"]}).images)


def sdxl() -> Pipe:
    torch.manual_seed(0)
    model = conditional(
        TINY_SD
        | {
            "layers_per_block": 1,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 4 * 6 + 10,
            "use_linear_projection": True,
        }
    )
    parts = nothing("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = diffusers(
        "StableDiffusionXLPipeline",
        vae=autoencoder(4),
        unet=model,
        scheduler=diffusers("EulerDiscreteScheduler"),
        add_watermarker=False,
        force_zeros_for_empty_prompt=False,
        **parts,
    )
    embeds = {
        "prompt_embeds": noise(1, TOKENS, 12),
        "negative_prompt_embeds": noise(1, TOKENS, 12, seed=1),
        "pooled_prompt_embeds": noise(1, 10, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 10, seed=3),
    }
    return pipe, lambda p: p(height=16, width=16, **embeds, **common()).images


def pixart() -> Pipe:
    pipe = diffusers(
        "PixArtAlphaPipeline",
        vae=autoencoder(4),
        transformer=ZOO["pixart"].build().model,
        scheduler=diffusers("DPMSolverMultistepScheduler"),
        **nothing("text_encoder", "tokenizer"),
    )
    embeds = {
        "prompt_embeds": noise(1, TOKENS, 20),
        "negative_prompt_embeds": noise(1, TOKENS, 20, seed=1),
        "prompt_attention_mask": torch.ones(1, TOKENS),
        "negative_prompt_attention_mask": torch.ones(1, TOKENS),
        "negative_prompt": None,
    }
    size = {"height": 16, "width": 16, "use_resolution_binning": False}
    return pipe, lambda p: p(**embeds, **size, **common()).images


def sd3() -> Pipe:
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    pipe = diffusers(
        "StableDiffusion3Pipeline",
        transformer=ZOO["sd3"].build().model,
        scheduler=diffusers("FlowMatchEulerDiscreteScheduler"),
        vae=autoencoder(4),
        **nothing(*names),
    )
    embeds = {
        "prompt_embeds": noise(1, TOKENS, 20),
        "negative_prompt_embeds": noise(1, TOKENS, 20, seed=1),
        "pooled_prompt_embeds": noise(1, 14, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 14, seed=3),
    }
    return pipe, lambda p: p(height=16, width=16, **embeds, **common()).images


def flux() -> Pipe:
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2")]
    pipe = diffusers(
        "FluxPipeline",
        transformer=ZOO["flux"].build().model,
        scheduler=diffusers("FlowMatchEulerDiscreteScheduler"),
        vae=autoencoder(2),
        **nothing(*names),
    )
    embeds = {"prompt_embeds": noise(1, TOKENS, 20), "pooled_prompt_embeds": noise(1, 14, seed=2)}
    return pipe, lambda p: p(height=16, width=16, **embeds, **common()).images


PIPELINES: Mapping[str, tuple[Callable[[], Pipe], Callable[..., Any]]] = {
    "ddpm": (ddpm, gw.apply_deepcache),
    "sdxl": (sdxl, gw.apply_deepcache),
    "pixart": (pixart, gw.apply_layer_cache),
    "sd3": (sd3, gw.apply_layer_cache),
    "flux": (flux, gw.apply_layer_cache),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_calls_on_every_pipeline(name: str) -> None:
    make, apply = PIPELINES[name]
    pipe, draw = make()
    pipe.set_progress_bar_config(disable=True)
    plain, attributes, config = draw(pipe), dict(vars(pipe)), dict(pipe.config)
    assert plain.isfinite().all() and float(plain.abs().max()) > 0.1
    with apply(pipe, interval=1):
        assert torch.equal(draw(pipe), plain)
    with apply(pipe, interval=2) as handle:
        got = draw(pipe)
        assert handle.history() == ("refresh", "reuse") * (STEPS // 2)
        assert torch.equal(draw(pipe), got)
        assert f"{STEPS} evaluations, {STEPS // 2} of them full" in handle.summary()
    assert got.shape == plain.shape and float((got - plain).abs().max()) > 1e-4
    assert vars(pipe) == attributes and dict(pipe.config) == config
    assert torch.equal(draw(pipe), plain)
