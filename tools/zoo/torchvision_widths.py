"""torchvision's builders with their widths divided; depths, heads, groups and windows stay those of the release.

A builder such as ``resnet152`` hands its table of settings to one function of its file, ``_resnet``. That function is
replaced while the builder runs by one that divides the widths among the arguments and then calls it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import nn

from .timm_shim import load

MODELS = "torchvision.models"
# by how much; models that are not here have the released widths
DIVISORS = {
    "convnext_tiny": 2,
    "convnext_small": 4,
    "convnext_base": 4,
    "convnext_large": 4,
    "densenet161": 3,
    "densenet169": 2,
    "densenet201": 2,
    "efficientnet_b4": 2,
    "efficientnet_b5": 2,
    "efficientnet_b6": 2,
    "efficientnet_b7": 2,
    "efficientnet_v2_s": 2,
    "efficientnet_v2_m": 2,
    "efficientnet_v2_l": 4,
    "maxvit_t": 2,
    "mvit_v1_b": 2,
    "mvit_v2_s": 2,
    "regnet_x_3_2gf": 2,
    "regnet_x_8gf": 4,
    "regnet_x_16gf": 8,
    "regnet_x_32gf": 8,
    "regnet_y_3_2gf": 2,
    "regnet_y_8gf": 4,
    "regnet_y_16gf": 8,
    "regnet_y_32gf": 8,
    "regnet_y_128gf": 8,
    "resnet50": 2,
    "resnet101": 2,
    "resnet152": 2,
    "resnext50_32x4d": 2,
    "resnext101_32x8d": 2,
    "resnext101_64x4d": 2,
    "wide_resnet50_2": 2,
    "wide_resnet101_2": 2,
    "deeplabv3_resnet50": 4,
    "deeplabv3_resnet101": 4,
    "fcn_resnet50": 4,
    "fcn_resnet101": 4,
    "swin_t": 2,
    "swin_s": 2,
    "swin_b": 4,
    "swin_v2_t": 2,
    "swin_v2_s": 2,
    "swin_v2_b": 4,
    "swin3d_t": 2,
    "swin3d_s": 2,
    "swin3d_b": 4,
    "vit_b_16": 4,
    "vit_b_32": 4,
    "vit_l_16": 8,
    "vit_l_32": 8,
    "vit_h_14": 8,
}


Settings = dict[str, Any]


def divided(name: str, settings: Settings | None = None, **options: Any) -> Any:
    """Build a model of torchvision without weights, its widths divided by `DIVISORS`.

    Args:
        name: as in ``torchvision.models.list_models()``.
        settings: what to replace among those that its builder fixes.
        options: of its builder.

    Returns:
        The module.
    """
    builder = load("torchvision").models.get_model_builder(name)
    by, file = DIVISORS.get(name, 1), builder.__module__.removeprefix(f"{MODELS}.")
    if by == 1 and not settings:
        return builder(weights=None, **options)
    # A segmentation network is built by another file than its backbone, of which its head takes 2048 channels.
    file, inner, divide = ("resnet", "_resnet", _inside) if file.startswith("segmentation") else (file, *DIVIDE[file])
    module = sys.modules[f"{MODELS}.{file}"]
    build = getattr(module, inner)

    def narrower(*args: Any, **kwargs: Any) -> nn.Module:
        given = inspect.signature(build).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        divide(given, by)
        return build(**(given | (settings or {})))

    with mock.patch.object(module, inner, narrower):
        return builder(weights=None, **options)


def _numbers(*names: str) -> Callable[[Settings, int], None]:
    """Return what divides the numbers, or lists of numbers, of these names."""

    def divide(given: Settings, by: int) -> None:
        for name in names:
            old = given[name]
            given[name] = [width // by for width in old] if isinstance(old, list) else old // by

    return divide


def _inside(given: Settings, by: int) -> None:
    """Divide the width inside of bottlenecks, or in each of their convolution's groups."""
    given["width_per_group"] = given.get("width_per_group", 64) // by


def _bottlenecks(given: Settings, by: int) -> None:
    """Divide the widths inside of bottlenecks and those between them, which are their expansion."""

    class Narrow(given["block"]):
        expansion = given["block"].expansion // by

    given["block"] = Narrow
    _inside(given, by)


def _stages(name: str, *widths: str) -> Callable[[Settings, int], None]:
    """Return what divides these attributes of a list of stages, up to multiples of 8.

    EfficientNet rounds what its blocks expand to multiples of 8, and leaves out an expansion that changes nothing.
    """

    def divide(given: Settings, by: int) -> None:
        stages = [copy.copy(stage) for stage in given[name]]
        for stage in stages:
            stage.__dict__ |= {w: -(-stage.__dict__[w] // (8 * by)) * 8 for w in widths if stage.__dict__[w]}
        given[name] = stages
        if given.get("last_channel"):
            given["last_channel"] //= by

    return divide


def _regnet(given: Settings, by: int) -> None:
    """Divide the widths of stages and of the groups of their convolutions: the number of groups stays."""
    table = given["block_params"] = copy.copy(given["block_params"])
    table.widths = [width // by for width in table.widths]
    table.group_widths = [width // by for width in table.group_widths]


# file: its function that takes the settings, and how to divide those
DIVIDE = {
    "convnext": ("_convnext", _stages("block_setting", "input_channels", "out_channels")),
    "densenet": ("_densenet", _numbers("growth_rate", "num_init_features")),
    "efficientnet": ("_efficientnet", _stages("inverted_residual_setting", "input_channels", "out_channels")),
    "maxvit": ("_maxvit", _numbers("stem_channels", "block_channels", "head_dim")),
    "regnet": ("_regnet", _regnet),
    "resnet": ("_resnet", _bottlenecks),
    "swin_transformer": ("_swin_transformer", _numbers("embed_dim")),
    "video.mvit": ("_mvit", _stages("block_setting", "input_channels", "output_channels")),
    "video.swin_transformer": ("_swin_transformer3d", _numbers("embed_dim")),
    "vision_transformer": ("_vision_transformer", _numbers("hidden_dim", "mlp_dim")),
}
