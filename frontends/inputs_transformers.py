"""Example inputs of transformers models, from the configuration and the names in ``forward``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .inputs_draw import BATCH, Draw, field, pair

TOKENS, TARGET_TOKENS = 12, 8
IMAGE_SIZE = 224  # of convolutional networks, whose configurations have none


def transformers_inputs(model: nn.Module, draw: Draw) -> dict[str, Any] | None:
    """Return keyword inputs, None where the model's main input is of a kind that is not known."""
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    make = _MAIN.get(main if isinstance(main, str) else "")
    if make is None or main not in taken:
        return None
    kwargs: dict[str, Any] = {main: make(config, draw)}
    for name, further in _FURTHER.items():
        if name in taken and name not in kwargs:
            value = further(model, config, draw)
            if value is not None:
                kwargs[name] = value
    if "use_cache" in taken:
        kwargs["use_cache"] = False
    return kwargs


def _text(config: Any) -> Any:
    """Return the part of a configuration that is about text."""
    get = getattr(config, "get_text_config", None)
    return get() if get is not None else field(config, "text_config", default=config)


def _vision(config: Any) -> Any:
    return field(config, "vision_config", "backbone_config", default=config)


def _length(config: Any, most: int) -> int:
    text = _text(config)
    names = ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx")
    limits = [limit for name in names if isinstance(limit := getattr(text, name, None), int) and limit > 0]
    return min([most, *limits[:1]])


def _input_ids(config: Any, draw: Draw) -> Tensor:
    vocabulary = field(config, "vocab_size") or field(_text(config), "vocab_size", default=0)
    return draw.tokens(BATCH, _length(config, TOKENS), vocabulary=int(vocabulary))


def _pixel_values(config: Any, draw: Draw) -> Tensor:
    size = field(config, "image_size") or field(_vision(config), "image_size", default=IMAGE_SIZE)
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else pair(size)
    channels = int(field(config, "num_channels") or field(_vision(config), "num_channels", "in_chans", default=3))
    frames = field(config, "num_frames")
    return draw.normal(BATCH, *([frames] if frames else []), channels, height, width)


def _input_features(config: Any, draw: Draw) -> Tensor:
    audio = field(config, "audio_config", default=config)
    bins = int(field(audio, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=80))
    frames = field(audio, "max_source_positions")
    if frames is not None and hasattr(audio, "num_mel_bins"):
        return draw.normal(BATCH, bins, 2 * int(frames))  # Whisper: a convolution of stride 2 comes first
    return draw.normal(BATCH, 64, bins)


def _input_values(config: Any, draw: Draw) -> Tensor:
    """A spectrogram for spectrogram transformers, else a wave form long enough for 16 frames."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and hasattr(config, "patch_size"):
        return draw.normal(BATCH, int(config.max_length), int(config.num_mel_bins))
    strides = field(config, "conv_stride", default=[320])
    kernels = field(config, "conv_kernel", default=[400])
    return draw.normal(BATCH, 16 * math.prod(strides) + sum(kernels))


def _decoder_input_ids(model: nn.Module, config: Any, draw: Draw) -> Tensor | None:
    if not getattr(config, "is_encoder_decoder", False):
        return None
    decoder = field(config, "decoder", default=config)
    vocabulary = field(decoder, "vocab_size") or field(_text(config), "vocab_size")
    return draw.tokens(BATCH, _length(config, TARGET_TOKENS), vocabulary=int(vocabulary)) if vocabulary else None


def _second_tower(make: Callable[[Any, Draw], Tensor]) -> Callable[[nn.Module, Any, Draw], Tensor | None]:
    """Make the input of the other tower of a model that compares two, such as CLIP."""

    def further(model: nn.Module, config: Any, draw: Draw) -> Tensor | None:
        return make(config, draw) if hasattr(model, "logit_scale") else None

    return further


def _points(model: nn.Module, config: Any, draw: Draw) -> Tensor | None:
    """One point in the picture as a prompt, for models that segment what they are pointed at."""
    if not hasattr(model, "prompt_encoder"):
        return None
    return draw.uniform(BATCH, 1, 1, 2) * pair(field(_vision(config), "image_size", default=1024))[0]


_MAIN: dict[str, Callable[[Any, Draw], Tensor]] = {
    "input_ids": _input_ids,
    "pixel_values": _pixel_values,
    "input_features": _input_features,
    "input_values": _input_values,
}
_FURTHER: dict[str, Callable[[nn.Module, Any, Draw], Tensor | None]] = {
    "input_ids": _second_tower(_input_ids),
    "pixel_values": _second_tower(_pixel_values),
    "decoder_input_ids": _decoder_input_ids,
    "input_points": _points,
}
