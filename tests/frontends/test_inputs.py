"""Example inputs run and capture with a batch that varies, for every class that is listed; descriptions are checked."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.frontends.inputs import example_inputs, inputs_from_spec
from graphwright.frontends.inputs_diffusers import TABLE
from graphwright.graph.errors import PreconditionError

CROSS = 20
DOWN, UP = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
UNET = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
)  # fmt: skip
CONDITION = UNET | dict(cross_attention_dim=CROSS, attention_head_dim=2, down_block_types=DOWN, up_block_types=UP)
SDXL = CONDITION | dict(
    addition_embed_type="text_time", addition_time_embed_dim=6, projection_class_embeddings_input_dim=6 * 6 + 10
)
UNET2D = UNET | dict(
    attention_head_dim=4, down_block_types=("AttnDownBlock2D",),
    up_block_types=("AttnUpBlock2D",),
)  # fmt: skip
DIT = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, patch_size=2)
PIXART = DIT | dict(out_channels=8, attention_head_dim=12, cross_attention_dim=24, caption_channels=CROSS)
SD3 = DIT | dict(
    out_channels=4, joint_attention_dim=CROSS, caption_projection_dim=16, pooled_projection_dim=14, pos_embed_max_size=8
)
FLUX = dict(
    in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=CROSS, pooled_projection_dim=14, axes_dims_rope=(2, 2, 4),
)  # fmt: skip
VIDEO = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32,), layers_per_block=1,
    cross_attention_dim=CROSS, down_block_types=("CrossAttnDownBlockSpatioTemporal",),
    up_block_types=("CrossAttnUpBlockSpatioTemporal",), addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=18, num_attention_heads=2,
)  # fmt: skip
VAE = dict(
    in_channels=3, out_channels=3, block_out_channels=(8, 12), layers_per_block=1, latent_channels=4, norm_num_groups=2,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
)  # fmt: skip

# Class, configuration, and names of inputs with sizes that must be there (0 is the batch).
DIFFUSERS: dict[str, tuple[str, dict[str, Any], dict[str, list[int]]]] = {
    "unet2d": ("UNet2DModel", UNET2D, {"sample": [0, 4, 8, 8], "timestep": [0]}),
    "condition": ("UNet2DConditionModel", CONDITION, {"encoder_hidden_states": [0, 77, CROSS]}),
    "sdxl": ("UNet2DConditionModel", SDXL, {"added_cond_kwargs.text_embeds": [0, 10], "added_cond_kwargs.time_ids": [0, 6]}),
    "dit": ("DiTTransformer2DModel", DIT | dict(num_embeds_ada_norm=10), {"class_labels": [0]}),
    "pixart": ("PixArtTransformer2DModel", PIXART, {"encoder_hidden_states": [0, 120, CROSS]}),
    "sd3": ("SD3Transformer2DModel", SD3, {"pooled_projections": [0, 14]}),
    "flux": ("FluxTransformer2DModel", FLUX, {"img_ids": [64, 3], "hidden_states": [0, 64, 8]}),
    "audioldm2": (
        "AudioLDM2UNet2DConditionModel", CONDITION | dict(cross_attention_dim=((None, 10, 14),)),
        {"encoder_hidden_states": [0, 8, 10], "encoder_hidden_states_1": [0, 16, 14]},
    ),
    "spatio temporal": ("UNetSpatioTemporalConditionModel", VIDEO, {"sample": [0, 4, 4, 8, 8], "added_time_ids": [0, 3]}),
    "autoencoder": ("AutoencoderKL", VAE, {"sample": [0, 3, 16, 16]}),
}  # fmt: skip
# Further configurations, which only have to run.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, list[int]]]] = {
    "unet2d classes": ("UNet2DModel", UNET2D | dict(num_class_embeds=5), {"class_labels": [0]}),
    "unet2d identity": ("UNet2DModel", UNET2D | dict(class_embed_type="identity"), {"class_labels": [0, 32]}),
    "wide": ("UNet2DConditionModel", CONDITION | dict(sample_size=(8, 16)), {"sample": [0, 4, 8, 16]}),
    "classes": ("UNet2DConditionModel", CONDITION | dict(num_class_embeds=5), {"class_labels": [0]}),
    "class timestep": ("UNet2DConditionModel", CONDITION | dict(class_embed_type="timestep"), {"class_labels": [0]}),
    "class projection": (
        "UNet2DConditionModel", CONDITION | dict(class_embed_type="projection", projection_class_embeddings_input_dim=9),
        {"class_labels": [0, 9]},
    ),
    "text projection": (
        "UNet2DConditionModel", CONDITION | dict(encoder_hid_dim=14, encoder_hid_dim_type="text_proj"),
        {"encoder_hidden_states": [0, 77, 14]},
    ),
    "text addition": (
        "UNet2DConditionModel", CONDITION | dict(addition_embed_type="text", addition_embed_type_num_heads=4),
        {"encoder_hidden_states": [0, 77, CROSS]},
    ),
    "image": (
        "UNet2DConditionModel",
        CONDITION | dict(encoder_hid_dim=14, encoder_hid_dim_type="image_proj", addition_embed_type="image"),
        {"added_cond_kwargs.image_embeds": [0, 14]},
    ),
    "per level": ("UNet2DConditionModel", CONDITION | dict(cross_attention_dim=(CROSS,)), {}),
    "controlnet": (
        "ControlNetModel", dict(in_channels=4, block_out_channels=(8,), layers_per_block=1, down_block_types=DOWN,
        cross_attention_dim=CROSS, attention_head_dim=2, norm_num_groups=4, conditioning_embedding_out_channels=(5, 7)),
        {"controlnet_cond": [0, 3, 128, 128]},
    ),
    "pixart conditions": (
        "PixArtTransformer2DModel", PIXART | dict(use_additional_conditions=True),
        {"added_cond_kwargs.resolution": [0, 2], "added_cond_kwargs.aspect_ratio": [0, 1]},
    ),
    "flux guidance": ("FluxTransformer2DModel", FLUX | dict(guidance_embeds=True), {"guidance": [0]}),
    "sana, by names": (
        "SanaTransformer2DModel", dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=CROSS, sample_size=8, patch_size=1), {"encoder_hidden_states": [0, 77, CROSS]},
    ),
    "prior": (
        "PriorTransformer", dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=10,
        num_embeddings=6, additional_embeddings=4), {"proj_embedding": [0, 10]},
    ),
    "latte": (
        "LatteTransformer3DModel", dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=1, cross_attention_dim=16, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=10, norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=CROSS,
        video_length=3), {"hidden_states": [0, 4, 3, 8, 8]},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel", dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=10, text_embed_dim=CROSS, num_layers=1, sample_width=8, sample_height=8, sample_frames=9,
        patch_size=2, max_text_seq_length=6), {"hidden_states": [0, 3, 4, 8, 8]},
    ),
    "unet1d": (
        "UNet1DModel", dict(sample_size=64, in_channels=2, out_channels=2, extra_in_channels=64,
        block_out_channels=(32, 32, 64), time_embedding_type="fourier"), {"sample": [0, 2, 64]},
    ),
    "unet3d": (
        "UNet3DConditionModel", dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32),
        layers_per_block=1, cross_attention_dim=CROSS, attention_head_dim=8, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")),
        {"sample": [0, 4, 4, 8, 8]},
    ),
    "tiny autoencoder": (
        "AutoencoderTiny", dict(encoder_block_out_channels=(6, 6), decoder_block_out_channels=(6, 6),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)), {"sample": [0, 3, 32, 32]},
    ),
    "vq": (
        "VQModel", dict(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=6, sample_size=8),
        {"sample": [0, 3, 8, 8]},
    ),
}  # fmt: skip

TEXT = dict(
    vocab_size=41, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
    max_position_embeddings=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
)
WHISPER = dict(
    vocab_size=41, num_mel_bins=5, encoder_layers=1, encoder_attention_heads=4, decoder_layers=1,
    decoder_attention_heads=4, encoder_ffn_dim=20, decoder_ffn_dim=20, d_model=24, max_source_positions=10,
    max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
)  # fmt: skip
SAM = VISION | dict(
    output_channels=12, mlp_dim=20, window_size=2, global_attn_indexes=[0], num_pos_feats=6, patch_size=4
)
SAM_PARTS = dict(
    vision_config=SAM,
    prompt_encoder_config=dict(hidden_size=12, image_size=16, patch_size=4, mask_input_channels=8),
    mask_decoder_config=dict(
        hidden_size=12, mlp_dim=14, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=12
    ),
)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], dict[str, list[int]]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, {"input_ids": [0, 10]}),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, {"input_ids": [0, 10]}),
    "t5": (
        "T5ForConditionalGeneration", "T5Config", dict(vocab_size=41, d_model=16, d_kv=8, d_ff=20, num_layers=1,
        num_heads=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0),
        {"input_ids": [0, 12], "decoder_input_ids": [0, 8]},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, {"pixel_values": [0, 3, 16, 16]}),
    "grey vit": ("ViTModel", "ViTConfig", VISION | dict(num_channels=1), {"pixel_values": [0, 1, 16, 16]}),
    "resnet": (
        "ResNetForImageClassification", "ResNetConfig", dict(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1]),
        {"pixel_values": [0, 3, 224, 224]},
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        {"input_features": [0, 5, 20], "decoder_input_ids": [0, 8]},
    ),
    "wav2vec2": (
        "Wav2Vec2Model", "Wav2Vec2Config", dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=20, conv_dim=[6, 8], conv_kernel=[6, 3], conv_stride=[4, 2], num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2), {"input_values": [0, 16 * 8 + 9]},
    ),
    "spectrogram": (
        "ASTModel", "ASTConfig", dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=20,
        patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=12), {"input_values": [0, 16, 12]},
    ),
    "clip": (
        "CLIPModel", "CLIPConfig", dict(text_config=TEXT, vision_config=VISION, projection_dim=6),
        {"input_ids": [0, 10], "pixel_values": [0, 3, 16, 16]},
    ),
    "sam encoder": ("SamVisionModel", "SamVisionConfig", SAM, {"pixel_values": [0, 3, 16, 16]}),
    "sam": ("SamModel", "SamConfig", SAM_PARTS, {"pixel_values": [0, 3, 16, 16], "input_points": [0, 1, 1, 2]}),
}  # fmt: skip


def build(library: str, name: str, *config: Any, **fields: Any) -> nn.Module:
    module = importlib.import_module(library)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [getattr(module, config[0])(**fields)] if config else []
        return getattr(module, name)(*made, **({} if config else fields)).eval()


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of the example inputs by name, after running the model on them."""
    args, kwargs, dynamic = example_inputs(model)
    assert args == () and dynamic is None
    with torch.no_grad():
        outputs = [x for x in pytree.tree_leaves(model(**kwargs)) if isinstance(x, Tensor)]
    assert outputs and all(x.isfinite().all() for x in outputs)
    leaves = pytree.tree_flatten_with_path(kwargs)[0]
    return {
        ".".join(str(getattr(key, "key", key)) for key in path): list(leaf.shape)
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }


def assert_captures_with_a_batch_that_varies(model: nn.Module, wanted: dict[str, list[int]]) -> None:
    assert_has(shapes(model), wanted)
    args, kwargs, dynamic = example_inputs(model)
    program = capture(model, args, kwargs, dynamic)
    found = {spec.name: spec.shape for spec in program.inputs}
    for name, shape in wanted.items():
        assert found[name] == tuple(size or "batch" for size in shape)
    assert program.notes == ()


def assert_has(found: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    assert {n: found.get(n) for n in wanted} == {n: [size or 2 for size in s] for n, s in wanted.items()}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_listed_diffusers_class_captures(name: str) -> None:
    cls, config, wanted = DIFFUSERS[name]
    assert cls in TABLE
    assert_captures_with_a_batch_that_varies(build("diffusers", cls, **config), wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_variant_runs(name: str) -> None:
    cls, config, wanted = VARIANTS[name]
    assert_has(shapes(build("diffusers", cls, **config)), wanted)


def test_every_class_of_the_table_is_tested() -> None:
    assert set(TABLE) <= {case[0] for case in (*DIFFUSERS.values(), *VARIANTS.values())}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_family_captures(name: str) -> None:
    cls, config, fields, wanted = TRANSFORMERS[name]
    assert_captures_with_a_batch_that_varies(build("transformers", cls, config, **fields), wanted)


def test_caches_are_off_and_masks_left_out() -> None:
    model = build("transformers", "LlamaForCausalLM", "LlamaConfig", **TEXT)
    _, kwargs, _ = example_inputs(model)
    assert set(kwargs) == {"input_ids", "use_cache"} and kwargs["use_cache"] is False
    assert kwargs["input_ids"].min() >= 3 and kwargs["input_ids"].max() < 41


def test_inputs_have_the_dtype_of_the_model_and_leave_the_global_generator() -> None:
    model = build("transformers", "ViTModel", "ViTConfig", **VISION).to(torch.bfloat16)
    state = torch.get_rng_state()
    first, second = (example_inputs(model)[1]["pixel_values"] for _ in range(2))
    assert first.dtype is torch.bfloat16 and torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_example_array_and_timm_size_are_used() -> None:
    model = nn.Conv2d(3, 4, 3)
    model.pretrained_cfg = {"input_size": (3, 20, 24)}  # type: ignore[assignment]
    assert example_inputs(model)[0][0].shape == (2, 3, 20, 24)
    model.example_input_array = torch.ones(5, 3, 8, 8)
    assert torch.equal(example_inputs(model)[0][0], model.example_input_array)


def test_unknown_model_says_how_to_give_inputs() -> None:
    with pytest.raises(PreconditionError, match="inputs of Linear are not known; say what goes in with `inputs:"):
        example_inputs(nn.Linear(2, 2))
    series = build(
        "transformers", "TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", prediction_length=4, d_model=8,
        encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    with pytest.raises(PreconditionError, match="inputs of TimeSeriesTransformerModel are not known"):
        example_inputs(series)


# ---------------------------------------------------------------------- descriptions


def test_description_gives_tensors_constants_and_dynamic_dimensions() -> None:
    args, kwargs, dynamic = inputs_from_spec(
        {
            "sample": {"shape": [2, 4, 8, 8], "dtype": "bfloat16", "dynamic": {0: "batch", -1: "width"}},
            "input_ids": {"shape": [2, 500], "dtype": "int64", "low": 3, "high": 9},
            "guidance": {"shape": [300], "low": 2, "high": 3},
            "mask": {"shape": [2, 5], "dtype": "bool", "value": True},
            "scale": {"shape": [], "value": 0.5},
            "added.time_ids": {"shape": [2, 6]},
            "added.inner.flag": False,
            "return_dict": False,
            "mode": {"value": "fast"},
        }
    )
    assert args == () and dynamic == {"sample": {0: "batch", 3: "width"}}
    assert kwargs["sample"].dtype is torch.bfloat16 and kwargs["sample"].shape == (2, 4, 8, 8)
    assert set(kwargs["input_ids"].unique().tolist()) == {3, 4, 5, 6, 7, 8}
    assert 2 <= kwargs["guidance"].min() < 2.1 < 2.9 < kwargs["guidance"].max() < 3
    assert kwargs["mask"].dtype is torch.bool and kwargs["mask"].all()
    assert kwargs["scale"].shape == () and kwargs["scale"] == 0.5
    assert kwargs["added"]["time_ids"].shape == (2, 6) and kwargs["added"]["inner"] == {"flag": False}
    assert kwargs["return_dict"] is False and kwargs["mode"] == "fast"


def test_description_gives_the_same_values_for_the_same_seed() -> None:
    draw = [inputs_from_spec({"x": {"shape": [2, 3]}}, seed=seed) for seed in (0, 0, 1)]
    x, same, other = (made[1]["x"] for made in draw)
    assert torch.equal(x, same) and not torch.equal(x, other) and draw[0][2] is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"x": {"shapes": [2]}}, "'x' has an unknown field 'shapes'; did you mean 'shape'"),
        ({"x": {"zzz": 1}}, "unknown field 'zzz'; known: .*dtype.*shape"),
        ({"x": {"dtype": "int64"}}, "'x' needs a shape"),
        ({"x": {}}, "'x' needs a shape"),
        ({"x": {"shape": 2}}, r"shape of 'x' must be a list of sizes such as \[2, 3\], got 2"),
        ({"x": {"shape": [2, "n"]}}, "shape of 'x' must be"),
        ({"x": {"shape": [2, -1]}}, "shape of 'x' must be"),
        ({"x": {"shape": [2, True]}}, "shape of 'x' must be"),
        ({"x": {"shape": [2], "dtype": "float23"}}, "dtype of 'x' must be one such as float32.*'float23'"),
        ({"x": {"shape": [2], "dtype": "load"}}, "dtype of 'x' must be"),
        ({"x": {"shape": [2], "dtype": "int64"}}, "'x' of dtype torch.int64 needs `high`"),
        ({"x": {"shape": [2], "low": 3, "high": 3}}, "'x' needs low < high, got low 3 and high 3"),
        ({"x": {"shape": [2], "low": 3}}, "'x' of dtype torch.float32 needs `high`"),
        ({"x": {"shape": [2], "dynamic": {1: "n"}}}, "`dynamic` of 'x' must map its 1 dimensions"),
        ({"x": {"shape": [2], "dynamic": ["n"]}}, "`dynamic` of 'x'"),
        ({"x": {"value": 3, "dynamic": {0: "n"}}}, "'x' needs a shape"),
        ({"a": 1, "a.b": {"shape": [2]}}, "'a.b' is inside 'a', which is given as a value"),
        ({"a.b": {"shape": [2]}, "a": 1}, "'a' is given twice"),
    ],
)
def test_malformed_description_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        inputs_from_spec(spec)
