"""Diffusers models, tiny configurations with the layer types of the released checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entry import Case, Entry, case, image, source
from .timm_shim import load

NEEDS = ("diffusers",)
CROSS = 20  # features of the text states, a program input
LATENT = 4


def make(name: str, /, **config: Any) -> nn.Module:
    """Build a diffusers model by the name of its class."""
    return getattr(load("diffusers"), name)(**config)


def steps(b: int) -> torch.Tensor:
    """One timestep per sample."""
    return torch.arange(b) * 37 + 11


def states(b: int, length: int = 6, width: int = CROSS, seed: int = 5) -> torch.Tensor:
    """Text features (batch, length, width)."""
    return torch.randn(b, length, width, generator=source(seed + b))


def unet2d(scalar: bool = False, **more: Any) -> Callable[[], Case]:
    """Unconditional U-Net with attention at two of three levels; skip concats of unequal widths."""

    def build() -> Case:
        values = dict(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 24, 40),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
        model = make("UNet2DModel", **(values | more))
        dyn = torch.export.Dim.DYNAMIC
        time = (lambda b: torch.tensor(17)) if scalar else steps
        return case(
            model,
            lambda b: {"sample": image(b, 3, 8, 8), "timestep": time(b)},
            dynamic={"sample": {0: dyn}, "timestep": None} if scalar else None,
            seed=3,
        )

    return build


def conditioned(model: nn.Module, size: int = 8, **extra: Callable[[int], Any]) -> Case:
    """Inputs of a text-conditioned latent U-Net; `extra` maps further argument names to their makers."""
    return case(
        model,
        lambda b: (
            {"sample": image(b, LATENT, size, size), "timestep": steps(b), "encoder_hidden_states": states(b)}
            | {k: f(b) for k, f in extra.items()}
        ),
    )


def sd15(widths: tuple[int, ...] = (16, 24, 32, 40)) -> Case:
    """Stable Diffusion 1.5: three levels with cross attention and one without, convolutional projections."""
    return conditioned(
        make(
            "UNet2DConditionModel",
            sample_size=16,
            in_channels=LATENT,
            out_channels=LATENT,
            block_out_channels=widths,
            layers_per_block=1,
            cross_attention_dim=CROSS,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        16,
    )


def sdxl() -> Case:
    """SDXL: deeper transformers lower down, linear projections, text and size embeddings added."""
    model = make(
        "UNet2DConditionModel",
        sample_size=8,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(16, 24, 40),
        layers_per_block=1,
        cross_attention_dim=CROSS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 5),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        norm_num_groups=4,
        projection_class_embeddings_input_dim=6 * 6 + 10,
    )
    return conditioned(
        model,
        added_cond_kwargs=lambda b: {
            "text_embeds": image(b, 10),
            "time_ids": torch.rand(b, 6, generator=source(b)) * 9,
        },
    )


def kandinsky22() -> Case:
    """Kandinsky 2.2: resnet samplers, scale-shift norms, image embeddings, added keys and values."""
    model = make(
        "UNet2DConditionModel",
        sample_size=8,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(16, 24),
        layers_per_block=1,
        cross_attention_dim=CROSS,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        encoder_hid_dim=14,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    )
    return case(
        model,
        lambda b: {
            "sample": image(b, LATENT, 8, 8),
            "timestep": steps(b),
            "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": image(b, 14)},
        },
    )


def audioldm2() -> Case:
    """AudioLDM2: every attention position holds transformers for two kinds of states and one without."""
    cross = (None, 10, 14)
    model = make(
        "AudioLDM2UNet2DConditionModel",
        sample_size=8,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=(cross, cross),
    )
    return case(
        model,
        lambda b: {
            "sample": image(b, LATENT, 8, 8),
            "timestep": steps(b),
            "encoder_hidden_states": states(b, 6, 10),
            "encoder_hidden_states_1": states(b, 5, 14),
            "encoder_attention_mask_1": torch.ones(b, 5),
        },
    )


def spatio_temporal() -> Case:
    """Stable Video Diffusion: spatial and temporal residual blocks mixed by a learned factor; 32 norm groups."""
    model = make(
        "UNetSpatioTemporalConditionModel",
        sample_size=8,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=CROSS,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=18,
        num_attention_heads=(2, 4),
        num_frames=3,
    )
    return case(
        model,
        lambda b: {
            "sample": image(b, 3, LATENT, 8, 8),
            "timestep": torch.tensor(17),
            "encoder_hidden_states": states(b, 3),
            "added_time_ids": torch.rand(b, 3, generator=source(b)) * 9,
        },
        dynamic=dict.fromkeys(("sample", "encoder_hidden_states", "added_time_ids"), {0: torch.export.Dim.DYNAMIC})
        | {"timestep": None},
    )


def unet3d() -> Case:
    """Text-to-video U-Net with temporal convolutions and temporal transformers; 32 norm groups."""
    model = make(
        "UNet3DConditionModel",
        sample_size=8,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=CROSS,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=4,
    )
    return case(
        model, lambda b: {"sample": image(b, LATENT, 3, 8, 8), "timestep": steps(b), "encoder_hidden_states": states(b)}
    )


def controlnet() -> Case:
    """ControlNet: the down half of the U-Net, an embedding of the condition image, one output per skip."""
    model = make(
        "ControlNetModel",
        in_channels=LATENT,
        block_out_channels=(16, 24),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=CROSS,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(5, 7),
    )
    return conditioned(model, controlnet_cond=lambda b: image(b, 3, 16, 16))


def autoencoder(part: str) -> Callable[[], Case]:
    """AutoencoderKL: the decoder behind `decode`, or the whole with the posterior's mean."""

    class Decoder(nn.Module):
        """The path from latents to images."""

        def __init__(self, vae: Any) -> None:
            """Keep the two parts that decoding uses."""
            super().__init__()
            self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            """Latents to images."""
            return self.decoder(self.post_quant_conv(z))

    def build() -> Case:
        vae = make(
            "AutoencoderKL",
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 12),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=LATENT,
            norm_num_groups=2,
            sample_size=16,
        )
        if part == "decoder":
            return case(Decoder(vae), lambda b: image(b, LATENT, 6, 6))
        return case(vae, lambda b: {"sample": image(b, 3, 12, 12)})

    return build


def dit() -> Case:
    """DiT: modulation by class and timestep, zero-initialised in the original."""
    model = make(
        "DiTTransformer2DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=LATENT,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return case(
        model,
        lambda b: {
            "hidden_states": image(b, LATENT, 8, 8),
            "timestep": steps(b),
            "class_labels": torch.arange(b) * 3 + 1,
        },
    )


def pixart() -> Case:
    """PixArt: one shared modulation, a table per block, projected captions."""
    model = make(
        "PixArtTransformer2DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=LATENT,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        caption_channels=CROSS,
        use_additional_conditions=False,
    )
    return case(
        model,
        lambda b: {"hidden_states": image(b, LATENT, 8, 8), "timestep": steps(b), "encoder_hidden_states": states(b)},
    )


def sd3(**more: Any) -> Callable[[], Case]:
    """Stable Diffusion 3: joint attention of image and text streams, the last block drops the text."""

    def build() -> Case:
        model = make(
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=LATENT,
            out_channels=LATENT,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=CROSS,
            caption_projection_dim=24,
            pooled_projection_dim=14,
            pos_embed_max_size=8,
            **more,
        )
        return case(
            model,
            lambda b: {
                "hidden_states": image(b, LATENT, 8, 8),
                "timestep": steps(b),
                "encoder_hidden_states": states(b),
                "pooled_projections": image(b, 14),
            },
        )

    return build


def flux() -> Case:
    """Flux: two-stream and single-stream blocks, norms over the head size, interleaved rotary positions."""
    model = make(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=CROSS,
        pooled_projection_dim=14,
        axes_dims_rope=(2, 2, 4),
    )
    dyn = torch.export.Dim.DYNAMIC
    batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    grid = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1)
    return case(
        model,
        lambda b: {
            "hidden_states": states(b, 16, 8, 3),
            "encoder_hidden_states": states(b),
            "pooled_projections": image(b, 14),
            "timestep": steps(b) / 1000,
            "img_ids": grid,
            "txt_ids": torch.zeros(6, 3),
        },
        dynamic=dict.fromkeys(batched, {0: dyn}) | {"img_ids": None, "txt_ids": None},
    )


def auraflow() -> Case:
    """AuraFlow: joint blocks, then single ones over the concatenated streams; SwiGLU feed-forward."""
    model = make(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=LATENT,
        out_channels=LATENT,
        num_mmdit_layers=2,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=CROSS,
        caption_projection_dim=24,
        pos_embed_max_size=16,
    )
    return case(
        model,
        lambda b: {
            "hidden_states": image(b, LATENT, 8, 8),
            "timestep": steps(b) / 1000,
            "encoder_hidden_states": states(b),
        },
    )


def sana() -> Case:
    """Sana: linear attention, gated convolutional feed-forward, multi-head cross attention."""
    model = make(
        "SanaTransformer2DModel",
        in_channels=LATENT,
        out_channels=LATENT,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=CROSS,
        sample_size=8,
        patch_size=1,
    )
    return case(
        model,
        lambda b: {"hidden_states": image(b, LATENT, 8, 8), "timestep": steps(b), "encoder_hidden_states": states(b)},
    )


def prior() -> Case:
    """The image-embedding prior of Kandinsky: a causal transformer over embeddings."""
    model = make(
        "PriorTransformer",
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=10,
        num_embeddings=6,
        additional_embeddings=4,
    )
    return case(
        model,
        lambda b: {
            "hidden_states": image(b, 10),
            "timestep": steps(b),
            "proj_embedding": image(b, 10, seed=4),
            "encoder_hidden_states": states(b, 6, 10),
        },
    )


def latte() -> Case:
    """Latte: spatial and temporal blocks in turn, one shared modulation."""
    model = make(
        "LatteTransformer3DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=LATENT,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=CROSS,
        video_length=3,
        attention_bias=True,
    )
    return case(
        model,
        lambda b: {
            "hidden_states": image(b, LATENT, 3, 8, 8),
            "timestep": steps(b),
            "encoder_hidden_states": states(b),
        },
    )


def cogvideox() -> Case:
    """CogVideoX: expert modulation for text and video tokens in one joint attention."""
    model = make(
        "CogVideoXTransformer3DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=LATENT,
        out_channels=LATENT,
        time_embed_dim=10,
        text_embed_dim=CROSS,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=6,
    )
    return case(
        model,
        lambda b: {
            "hidden_states": image(b, 3, LATENT, 8, 8),
            "timestep": steps(b),
            "encoder_hidden_states": states(b),
        },
    )


def uvit() -> Case:
    """UVit2DModel of aMUSEd: token embedding, convolutional ends, transformer in the middle."""
    model = make(
        "UVit2DModel",
        hidden_size=24,
        encoder_hidden_size=CROSS,
        cond_embed_dim=14,
        vocab_size=19,
        codebook_size=17,
        in_channels=12,
        block_out_channels=12,
        num_res_blocks=1,
        num_hidden_layers=2,
        num_attention_heads=3,
        micro_cond_encode_dim=6,
        micro_cond_embed_dim=30,
        intermediate_size=28,
        block_num_heads=2,
        sample_size=6,
    )
    return case(
        model,
        lambda b: {
            "input_ids": torch.randint(0, 17, (b, 6, 6), generator=source(b)),
            "encoder_hidden_states": states(b),
            "pooled_text_emb": image(b, 14),
            "micro_conds": torch.rand(b, 5, generator=source(b)) * 9,
        },
    )


def tiny_autoencoder() -> Case:
    """AutoencoderTiny: rectified residual convolutions, no norms."""
    model = make(
        "AutoencoderTiny",
        encoder_block_out_channels=(6, 6),
        decoder_block_out_channels=(9, 9),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
        latent_channels=LATENT,
    )
    return case(model, lambda b: {"sample": image(b, 3, 16, 16)})


def unet1d() -> Case:
    """One-dimensional U-Net of Dance Diffusion."""
    model = make(
        "UNet1DModel",
        sample_size=64,
        in_channels=2,
        out_channels=2,
        extra_in_channels=64,
        block_out_channels=(32, 32, 64),
        time_embedding_type="fourier",
    )
    return case(model, lambda b: {"sample": image(b, 2, 64), "timestep": steps(b)})


ENTRIES: list[Entry] = [
    Entry(name, "diffusers", build, NEEDS, note, float64=name != "vae_tiny")
    for name, build, note in (
        ("unet2d", unet2d(), ""),
        ("unet2d_scalar_timestep", unet2d(scalar=True), "zero-dimensional timestep"),
        ("unet2d_scale_shift", unet2d(resnet_time_scale_shift="scale_shift", layers_per_block=2), ""),
        ("unet_sd15", sd15, "Stable Diffusion 1.5 layout"),
        ("unet_sdxl", sdxl, "SDXL layout"),
        ("unet_kandinsky22", kandinsky22, ""),
        ("unet_audioldm2", audioldm2, ""),
        ("unet_spatio_temporal", spatio_temporal, "Stable Video Diffusion"),
        ("unet3d", unet3d, ""),
        ("unet1d", unet1d, ""),
        ("controlnet", controlnet, ""),
        ("vae_decoder", autoencoder("decoder"), ""),
        ("vae_full", autoencoder("full"), ""),
        ("vae_tiny", tiny_autoencoder, ""),
        ("dit", dit, ""),
        ("pixart", pixart, ""),
        ("sd3", sd3(), ""),
        ("sd35", sd3(qk_norm="rms_norm", dual_attention_layers=(0,)), "norms over the head size, dual attention"),
        ("flux", flux, ""),
        ("auraflow", auraflow, ""),
        ("sana", sana, "linear attention"),
        ("prior", prior, ""),
        ("latte", latte, ""),
        ("cogvideox", cogvideox, ""),
        ("uvit2d", uvit, ""),
    )
]
