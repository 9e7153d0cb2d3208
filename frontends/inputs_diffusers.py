"""Example inputs of diffusers models: a small function for each class, and an attempt by the names in ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .inputs_draw import BATCH, Draw, field, pair

TEXT_TOKENS = 77
FRAMES = 4  # not the batch, which would make the frames vary with it
IMAGE_TOKENS = (8, 8)


def diffusers_inputs(model: nn.Module, draw: Draw) -> dict[str, Any] | None:
    """Return keyword inputs, None where the class is not known and its arguments' names do not say enough."""
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    for cls in type(model).__mro__:
        if cls.__name__ in TABLE:
            kwargs = TABLE[cls.__name__](config, draw)
            break
    else:
        kwargs = _by_names(config, draw, taken)
        if kwargs is None:
            return None
    return {**kwargs, "return_dict": False} if "return_dict" in taken else kwargs


def _size(config: Any, default: int = 32) -> tuple[int, int]:
    return pair(field(config, "sample_size", default=default))


def _image(config: Any, draw: Draw, default: int = 32) -> Tensor:
    return draw.normal(BATCH, int(config.in_channels), *_size(config, default))


def _first(value: Any) -> int:
    """Return the first number of what may be nested lists."""
    while isinstance(value, (tuple, list)):
        value = next(item for item in value if item is not None)
    return int(value)


def _unet2d(config: Any, draw: Draw) -> dict[str, Any]:
    kwargs = {"sample": _image(config, draw), "timestep": draw.timesteps()}
    return kwargs | _class_labels(config, draw)


def _class_labels(config: Any, draw: Draw) -> dict[str, Any]:
    kind, classes = config.class_embed_type, field(config, "num_class_embeds")
    if kind is None:
        return {"class_labels": draw.integers(BATCH, high=int(classes))} if classes else {}
    if kind == "timestep":
        return {"class_labels": draw.timesteps()}
    if kind == "identity":
        width = field(config, "time_embedding_dim", default=4 * _first(config.block_out_channels))
        return {"class_labels": draw.normal(BATCH, width)}
    return {"class_labels": draw.normal(BATCH, int(config.projection_class_embeddings_input_dim))}


def _unet2d_condition(config: Any, draw: Draw) -> dict[str, Any]:
    width, kind = _first(config.cross_attention_dim), config.encoder_hid_dim_type
    if config.encoder_hid_dim is not None and kind in (None, "text_proj", "text_image_proj"):
        width = int(config.encoder_hid_dim)
    kwargs: dict[str, Any] = {
        "sample": _image(config, draw, 64),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": None if kind == "image_proj" else draw.normal(BATCH, TEXT_TOKENS, width),
    }
    added = _added_conditions(config, draw)
    return kwargs | _class_labels(config, draw) | ({"added_cond_kwargs": added} if added else {})


def _added_conditions(config: Any, draw: Draw) -> dict[str, Tensor]:
    added: dict[str, Tensor] = {}
    kind, hidden = config.addition_embed_type, config.encoder_hid_dim_type
    if kind == "text_time":  # SDXL: pooled text, and six numbers for sizes and crops
        text = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
        added = {"text_embeds": draw.normal(BATCH, text), "time_ids": draw.uniform(BATCH, 6) * 1024}
    if kind == "text_image":
        width = _first(config.cross_attention_dim)
        added = {"text_embeds": draw.normal(BATCH, width), "image_embeds": draw.normal(BATCH, width)}
    if kind in ("image", "image_hint") or hidden == "image_proj":
        added["image_embeds"] = draw.normal(BATCH, int(config.encoder_hid_dim))
    if kind == "image_hint":
        height, width = _size(config, 64)
        added["hint"] = draw.normal(BATCH, 3, 8 * height, 8 * width)
    return added


def _controlnet(config: Any, draw: Draw) -> dict[str, Any]:
    kwargs = _unet2d_condition(config, draw)
    height, width = _size(config, 64)
    scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    shape = (BATCH, int(config.conditioning_channels), scale * height, scale * width)
    return {**kwargs, "controlnet_cond": draw.normal(*shape)}


def _unet3d(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw.normal(BATCH, int(config.in_channels), FRAMES, *_size(config)),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT_TOKENS, _first(config.cross_attention_dim)),
    }


def _spatio_temporal(config: Any, draw: Draw) -> dict[str, Any]:
    ids = int(config.projection_class_embeddings_input_dim) // int(config.addition_time_embed_dim)
    return {
        "sample": draw.normal(BATCH, FRAMES, int(config.in_channels), *_size(config, 64)),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": draw.normal(BATCH, 1, _first(config.cross_attention_dim)),
        "added_time_ids": draw.uniform(BATCH, ids),
    }


def _audioldm2(config: Any, draw: Draw) -> dict[str, Any]:
    """Of each position's transformers the first two attend to one text, further ones to the other."""
    dims = config.cross_attention_dim
    dims = dims[0] if isinstance(dims, (tuple, list)) else [dims]
    dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
    first = next((width for width in dims[:2] if width is not None), None)
    second = next((width for width in dims[2:] if width is not None), None)
    kwargs: dict[str, Any] = {
        "sample": _image(config, draw, 64),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": None if first is None else draw.normal(BATCH, 8, int(first)),
    }
    if second is not None:
        kwargs["encoder_hidden_states_1"] = draw.normal(BATCH, 16, int(second))
        kwargs["encoder_attention_mask_1"] = torch.ones(BATCH, 16, device=draw.device, dtype=draw.dtype)
    return kwargs | _class_labels(config, draw)


def _dit(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _image(config, draw),
        "timestep": draw.timesteps(),
        "class_labels": draw.integers(BATCH, high=int(config.num_embeds_ada_norm)),
    }


def _pixart(config: Any, draw: Draw) -> dict[str, Any]:
    width = int(field(config, "caption_channels", "cross_attention_dim"))
    kwargs: dict[str, Any] = {
        "hidden_states": _image(config, draw, 128),
        "encoder_hidden_states": draw.normal(BATCH, 120, width),
        "timestep": draw.timesteps(),
    }
    conditions = config.use_additional_conditions
    if conditions or (conditions is None and config.sample_size == 128):
        ratio = {"resolution": draw.uniform(BATCH, 2) * 1024, "aspect_ratio": draw.uniform(BATCH, 1)}
        kwargs["added_cond_kwargs"] = ratio
    return kwargs


def _sd3(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _image(config, draw, 128),
        "encoder_hidden_states": draw.normal(BATCH, TEXT_TOKENS, int(config.joint_attention_dim)),
        "pooled_projections": draw.normal(BATCH, int(config.pooled_projection_dim)),
        "timestep": draw.timesteps(),
    }


def _flux(config: Any, draw: Draw) -> dict[str, Any]:
    """Image tokens are packed already; positions have no batch."""
    rows, columns = IMAGE_TOKENS
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    positions = torch.cat([torch.zeros(rows * columns, 1), grid], dim=1).to(draw.device, draw.dtype)
    kwargs: dict[str, Any] = {
        "hidden_states": draw.normal(BATCH, rows * columns, int(config.in_channels)),
        "encoder_hidden_states": draw.normal(BATCH, TEXT_TOKENS, int(config.joint_attention_dim)),
        "pooled_projections": draw.normal(BATCH, int(config.pooled_projection_dim)),
        "timestep": draw.uniform(BATCH),
        "img_ids": positions,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=draw.device, dtype=draw.dtype),
    }
    return kwargs | ({"guidance": draw.uniform(BATCH) * 4} if config.guidance_embeds else {})


def _autoencoder(config: Any, draw: Draw) -> dict[str, Any]:
    return {"sample": _image(config, draw)}


def _unet1d(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw.normal(BATCH, int(config.in_channels), int(config.sample_size)),
        "timestep": draw.timesteps(),
    }


def _prior(config: Any, draw: Draw) -> dict[str, Any]:
    width = int(config.embedding_dim)
    return {
        "hidden_states": draw.normal(BATCH, width),
        "timestep": draw.timesteps(),
        "proj_embedding": draw.normal(BATCH, width),
        "encoder_hidden_states": draw.normal(BATCH, int(config.num_embeddings), width),
    }


def _cogvideox(config: Any, draw: Draw) -> dict[str, Any]:
    size = (int(config.sample_height), int(config.sample_width))
    frames = (int(config.sample_frames) - 1) // int(config.temporal_compression_ratio) + 1
    return {
        "hidden_states": draw.normal(BATCH, frames, int(config.in_channels), *size),
        "encoder_hidden_states": draw.normal(BATCH, int(config.max_text_seq_length), int(config.text_embed_dim)),
        "timestep": draw.timesteps(),
    }


def _latte(config: Any, draw: Draw) -> dict[str, Any]:
    frames = int(config.video_length)
    return {
        "hidden_states": draw.normal(BATCH, int(config.in_channels), frames, *_size(config, 64)),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": draw.normal(BATCH, 120, int(field(config, "caption_channels", "cross_attention_dim"))),
    }


def _by_names(config: Any, draw: Draw, taken: Mapping[str, inspect.Parameter]) -> dict[str, Any] | None:
    """Attempt a class that has no entry: an image-like input, a timestep and states of a width named in the config."""
    needed = [name for name, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    text = field(config, "caption_channels", "joint_attention_dim", "text_embed_dim", "cross_attention_dim")
    kwargs: dict[str, Any] = {}
    for name in dict.fromkeys([*needed, *(n for n in taken if n in ("timestep", "encoder_hidden_states"))]):
        if name in ("sample", "hidden_states", "x") and hasattr(config, "in_channels"):
            kwargs[name] = _image(config, draw)
        elif name == "timestep":
            kwargs[name] = draw.timesteps()
        elif name == "encoder_hidden_states" and text is not None:
            kwargs[name] = draw.normal(BATCH, TEXT_TOKENS, _first(text))
        elif name == "pooled_projections" and hasattr(config, "pooled_projection_dim"):
            kwargs[name] = draw.normal(BATCH, int(config.pooled_projection_dim))
        elif name in needed:
            return None
    return kwargs or None


TABLE: dict[str, Callable[[Any, Draw], dict[str, Any]]] = {
    "AudioLDM2UNet2DConditionModel": _audioldm2,
    "AutoencoderKL": _autoencoder,
    "AutoencoderTiny": _autoencoder,
    "CogVideoXTransformer3DModel": _cogvideox,
    "ControlNetModel": _controlnet,
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "LatteTransformer3DModel": _latte,
    "PixArtTransformer2DModel": _pixart,
    "PriorTransformer": _prior,
    "SD3Transformer2DModel": _sd3,
    "UNet1DModel": _unet1d,
    "UNet2DConditionModel": _unet2d_condition,
    "UNet2DModel": _unet2d,
    "UNet3DConditionModel": _unet3d,
    "UNetSpatioTemporalConditionModel": _spatio_temporal,
    "VQModel": _autoencoder,
}
