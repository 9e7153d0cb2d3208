"""Hugging Face vision and audio models, tiny configurations with distinct sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .entry import Case, Entry, case, image, tokens
from .timm_shim import load
from .transformers_models import NEEDS, SPECIAL, VOCAB, make

VIT = dict(
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    image_size=16,
    patch_size=8,
    num_labels=5,
)


def vision(model: str, config: str, size: int = 16, **values: Any) -> Callable[[], Case]:
    """A model of pixel values (batch, 3, size, size)."""
    return lambda: case(make(model, config, **values), lambda b: {"pixel_values": image(b, 3, size, size)})


def vit_interpolated() -> Case:
    """ViT at another image size than the configured one: positions are interpolated."""
    model = make("ViTForImageClassification", "ViTConfig", **VIT)
    return case(model, lambda b: {"pixel_values": image(b, 3, 24, 16), "interpolate_pos_encoding": True})


def swin(name: str = "Swin") -> Callable[[], Case]:
    """Two stages of two blocks, windows of 4 (the second block shifted), patch merging between them."""
    return vision(
        f"{name}ForImageClassification",
        f"{name}Config",
        32,
        image_size=32,
        patch_size=4,
        embed_dim=20,
        depths=[2, 2],
        num_heads=[2, 5],
        window_size=4,
        num_labels=5,
    )


def convnext(name: str = "ConvNext") -> Callable[[], Case]:
    """Two stages; version 2 has a global response norm instead of layer scale."""
    return vision(
        f"{name}ForImageClassification",
        f"{name}Config",
        16,
        num_stages=2,
        hidden_sizes=[10, 14],
        depths=[2, 1],
        patch_size=2,
        num_labels=5,
    )


def resnet(kind: str) -> Callable[[], Case]:
    """Two stages of basic or bottleneck blocks."""
    return vision(
        "ResNetForImageClassification",
        "ResNetConfig",
        32,
        embedding_size=6,
        hidden_sizes=[16, 20],
        depths=[2, 2],
        layer_type=kind,
        num_labels=5,
    )


def sam_config() -> dict[str, Any]:
    """SAM's vision part: one windowed and one global layer, decomposed relative positions."""
    return dict(
        hidden_size=24,
        output_channels=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=4,
        mlp_dim=28,
        window_size=3,
        global_attn_indexes=[1],
        initializer_range=0.02,
        num_pos_feats=10,
    )


def sam_encoder(**more: Any) -> Callable[[], Case]:
    """The image encoder alone."""

    def build() -> Case:
        model = make(
            "SamVisionEncoder", "SamVisionConfig", "transformers.models.sam.modeling_sam", **(sam_config() | more)
        )
        return case(model, lambda b: {"pixel_values": image(b, 3, 32, 32)})

    return build


def sam() -> Case:
    """Image encoder, point prompts and mask decoder."""
    library = load("transformers")
    config = library.SamConfig(
        vision_config=sam_config(),
        prompt_encoder_config=dict(
            hidden_size=20, image_size=32, patch_size=4, mask_input_channels=8, num_point_embeddings=4
        ),
        mask_decoder_config=dict(
            hidden_size=20,
            mlp_dim=26,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_downsample_rate=2,
            iou_head_hidden_dim=22,
            iou_head_depth=3,
            num_multimask_outputs=3,
        ),
    )
    return case(
        library.SamModel(config),
        lambda b: {
            "pixel_values": image(b, 3, 32, 32),
            "input_points": image(b, 1, 2, 2).sigmoid() * 32,
            "input_labels": torch.ones(b, 1, 2, dtype=torch.long),
        },
    )


def segformer() -> Case:
    """Hierarchical encoder with reduced keys and values, all levels fused in a convolutional decoder."""
    model = make(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[12, 20],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 3],
        decoder_hidden_size=18,
        num_labels=5,
    )
    return case(model, lambda b: {"pixel_values": image(b, 3, 32, 32)})


def detr() -> Case:
    """DETR: convolutional backbone, encoder and decoder with learned queries, two heads."""
    library = load("transformers")
    backbone = library.ResNetConfig(
        embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = library.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=28,
        decoder_ffn_dim=32,
        num_queries=7,
        num_labels=5,
    )
    return case(
        library.DetrForObjectDetection(config),
        lambda b: {"pixel_values": image(b, 3, 32, 32), "pixel_mask": torch.ones(b, 32, 32, dtype=torch.long)},
    )


def dpt() -> Case:
    """DPT: ViT levels reassembled at several resolutions and fused."""
    model = make(
        "DPTForDepthEstimation",
        "DPTConfig",
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=56,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 10, 12, 14],
        fusion_hidden_size=10,
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    return case(model, lambda b: {"pixel_values": image(b, 3, 32, 32)})


def mobilevit() -> Case:
    """MobileViT: inverted residuals, transformers over unfolded patches, concat with the input."""
    model = make(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        image_size=128,
        hidden_sizes=[12, 20, 24],
        neck_hidden_sizes=[6, 8, 10, 12, 14, 16, 40],
        num_attention_heads=4,
        mlp_ratio=2.0,
        num_labels=5,
    )
    return case(model, lambda b: {"pixel_values": image(b, 3, 128, 128)})


def siglip() -> Case:
    """SigLIP: two towers of equal output width, attention pooling head on the image side."""
    model = make(
        "SiglipModel",
        "SiglipConfig",
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=9,
            projection_size=24,
            **SPECIAL,
        ),
        vision_config=dict(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
    )
    return case(model, lambda b: {"input_ids": tokens(b, 9, VOCAB), "pixel_values": image(b, 3, 16, 16)})


def wav2vec2(stable: bool) -> Callable[[], Case]:
    """wav2vec 2.0: strided convolutions over the wave form, grouped positional convolution, encoder, CTC head."""

    def build() -> Case:
        model = make(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            vocab_size=11,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=56,
            conv_dim=[6, 8],
            conv_kernel=[6, 3],
            conv_stride=[4, 2],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            do_stable_layer_norm=stable,
            feat_extract_norm="layer" if stable else "group",
            conv_bias=stable,
            num_feat_extract_layers=2,
        )
        return case(model, lambda b: {"input_values": image(b, 80)})

    return build


def llava() -> Case:
    """LLaVA: image tokens projected into the places of image tokens in a Llama."""
    library = load("transformers")
    config = library.LlavaConfig(
        vision_config=library.CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=16,
            patch_size=8,
        ),
        text_config=library.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=28,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            **SPECIAL,
        ),
        image_token_index=60,
        image_token_id=60,
        vision_feature_layer=-1,
    )
    config.text_config.use_cache = False

    def inputs(b: int) -> dict[str, torch.Tensor]:
        ids = tokens(b, 9, VOCAB - 2)
        ids[:, 2:6] = 60  # as many image tokens as patches
        return {"input_ids": ids, "pixel_values": image(b, 3, 16, 16), "attention_mask": torch.ones_like(ids)}

    # the number of image tokens is compared with the number of features: the batch cannot be dynamic
    return case(library.LlavaForConditionalGeneration(config), inputs, dynamic={})


ENTRIES: list[Entry] = [
    Entry(name, "transformers", build, NEEDS, note)
    for name, build, note in (
        ("vit", vision("ViTForImageClassification", "ViTConfig", **VIT), ""),
        ("vit_interpolated", vit_interpolated, "positions interpolated"),
        ("deit", vision("DeiTForImageClassification", "DeiTConfig", **VIT), ""),
        (
            "dinov2",
            vision(
                "Dinov2ForImageClassification",
                "Dinov2Config",
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=6,
                mlp_ratio=2,
                image_size=16,
                patch_size=8,
                num_labels=5,
            ),
            "layer scale",
        ),
        (
            "dinov2_swiglu",
            vision(
                "Dinov2ForImageClassification",
                "Dinov2Config",
                hidden_size=48,
                num_labels=5,
                num_hidden_layers=2,
                num_attention_heads=6,
                mlp_ratio=2,
                image_size=16,
                patch_size=8,
                use_swiglu_ffn=True,
            ),
            "fused gate and value",
        ),
        (
            "beit",
            vision(
                "BeitForImageClassification",
                "BeitConfig",
                **VIT,
                use_relative_position_bias=True,
                use_mean_pooling=True,
            ),
            "relative position tables per layer",
        ),
        ("swin", swin(), "shifted windows"),
        ("swinv2", swin("Swinv2"), "cosine attention, continuous position bias"),
        ("convnext", convnext(), ""),
        ("convnextv2", convnext("ConvNextV2"), "global response norm"),
        ("hf_resnet_basic", resnet("basic"), ""),
        ("hf_resnet_bottleneck", resnet("bottleneck"), ""),
        (
            "hf_regnet",
            vision(
                "RegNetForImageClassification",
                "RegNetConfig",
                32,
                embedding_size=6,
                hidden_sizes=[8, 12],
                depths=[2, 2],
                groups_width=4,
                num_labels=5,
            ),
            "groups of 4, squeeze-excite",
        ),
        (
            "hf_mobilenet_v2",
            vision(
                "MobileNetV2ForImageClassification",
                "MobileNetV2Config",
                32,
                depth_multiplier=0.25,
                depth_divisible_by=4,
                min_depth=4,
                num_labels=5,
            ),
            "",
        ),
        (
            "hf_efficientnet",
            vision(
                "EfficientNetForImageClassification",
                "EfficientNetConfig",
                32,
                image_size=32,
                width_coefficient=1 / 32,
                depth_coefficient=0.3,
                depth_divisor=4,
                hidden_dim=40,
                in_channels=[32, 256],
                out_channels=[256, 384],
                kernel_sizes=[3, 5],
                strides=[1, 2],
                num_block_repeats=[1, 2],
                expand_ratios=[1, 3],
                depthwise_padding=[],
                num_labels=5,
            ),
            "",
        ),
        ("mobilevit", mobilevit, "unfolded patches"),
        (
            "pvt",
            vision(
                "PvtForImageClassification",
                "PvtConfig",
                32,
                image_size=32,
                num_encoder_blocks=2,
                depths=[1, 2],
                sequence_reduction_ratios=[2, 1],
                hidden_sizes=[12, 20],
                patch_sizes=[4, 2],
                strides=[4, 2],
                num_attention_heads=[2, 5],
                mlp_ratios=[2, 2],
                num_labels=5,
            ),
            "",
        ),
        (
            "poolformer",
            vision(
                "PoolFormerForImageClassification",
                "PoolFormerConfig",
                32,
                num_encoder_blocks=2,
                depths=[1, 2],
                hidden_sizes=[10, 14],
                patch_sizes=[7, 3],
                strides=[4, 2],
                padding=[2, 1],
                mlp_ratio=2.0,
                num_labels=5,
            ),
            "group norm of one group",
        ),
        ("segformer", segformer, ""),
        ("dpt", dpt, ""),
        ("detr", detr, ""),
        (
            "yolos",
            vision(
                "YolosForObjectDetection",
                "YolosConfig",
                16,
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=6,
                intermediate_size=56,
                image_size=[16, 16],
                patch_size=8,
                num_detection_tokens=5,
                num_labels=5,
            ),
            "detection tokens",
        ),
        ("sam_encoder", sam_encoder(), "decomposed relative positions"),
        ("sam_encoder_no_relative", sam_encoder(use_rel_pos=False), ""),
        ("sam", sam, "whole model"),
        ("siglip", siglip, "two towers"),
        ("llava", llava, "vision and language"),
        ("wav2vec2", wav2vec2(False), "group norm, weight norm on a grouped convolution"),
        ("wav2vec2_stable", wav2vec2(True), "layer norm variant"),
        (
            "audio_spectrogram",
            lambda: case(
                make(
                    "ASTForAudioClassification",
                    "ASTConfig",
                    hidden_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=6,
                    intermediate_size=56,
                    patch_size=4,
                    frequency_stride=4,
                    time_stride=4,
                    max_length=16,
                    num_mel_bins=12,
                    num_labels=5,
                ),
                lambda b: {"input_values": image(b, 16, 12)},
            ),
            "",
        ),
    )
]
