"""torchvision's models without weights: its classifiers, segmentation and video networks, and optical flow.

Depths, heads, groups and windows are the released ones. Pictures are about as small as keeps two positions a side
behind a stride of 32, and of large models the widths are divided (`torchvision_widths`). Left out are the detectors,
whose boxes and non-maximum suppression are compiled operators over sizes that depend on the data, and the quantised
builds, which have no floating-point weights to remove.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import Case, Entry, case, image
from .torchvision_widths import divided

NEEDS = ("torchvision",)

CLASSIFIERS = (
    "alexnet",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "convnext_large",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_s",
    "efficientnet_v2_m",
    "efficientnet_v2_l",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_x_800mf",
    "regnet_x_1_6gf",
    "regnet_x_3_2gf",
    "regnet_x_8gf",
    "regnet_x_16gf",
    "regnet_x_32gf",
    "regnet_y_400mf",
    "regnet_y_800mf",
    "regnet_y_1_6gf",
    "regnet_y_3_2gf",
    "regnet_y_8gf",
    "regnet_y_16gf",
    "regnet_y_32gf",
    "regnet_y_128gf",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_t",
    "swin_s",
    "swin_b",
    "swin_v2_t",
    "swin_v2_s",
    "swin_v2_b",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_b_32",
    "vit_l_16",
    "vit_l_32",
    "vit_h_14",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
)
VIDEO = ("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t", "swin3d_s", "swin3d_b")
FLOW = ("raft_small", "raft_large")

# the least that the stem of Inception takes; a whole number of patches of 14; the rest
PIXELS = {"inception_v3": 107, "vit_h_14": 56}
CLIP = (3, 4, 64, 64)  # channels, frames, height, width
CLIPS = {"mvit_v1_b": (3, 8, 64, 64), "mvit_v2_s": (3, 8, 64, 64), "s3d": (3, 16, 64, 64)}


def picture_case(name: str) -> Case:
    """Build one classifier with 5 classes."""
    size = PIXELS.get(name, 64)
    more: dict[str, Any] = {}
    if name.startswith("vit_"):
        more["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        more["aux_logits"] = False
    if name.startswith(("googlenet", "inception_v3", "vgg")):
        more["init_weights"] = False  # slow, and `case` draws them anyway
    # windows of 7 by 7 need 224 pixels, those of 2 by 2 are whole at every stage of 64
    settings = {"input_size": (size, size), "partition_size": 2} if name == "maxvit_t" else None
    model = divided(name, settings, num_classes=5, **more)
    if name == "alexnet" or name.startswith("vgg"):
        _narrow_classifier(model, 512)
    # products of channels and gates let EfficientNets grow block by block, where a channel hardly varies most
    floor = 0.25 if name.startswith("efficientnet") else 0.06
    return case(model, lambda b: image(b, 3, size, size), floor=floor)


def _narrow_classifier(model: Any, units: int) -> None:
    """Give the two hidden layers of a classifier, nine tenths of the parameters, fewer units than 4096."""
    layers = model.classifier
    first, second, last = (i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    layers[first] = nn.Linear(layers[first].in_features, units)
    layers[second] = nn.Linear(units, units)
    layers[last] = nn.Linear(units, layers[last].out_features)


def segmentation_case(name: str) -> Case:
    """Build one network of 5 classes a pixel, with the auxiliary head that it has for its training."""
    more: dict[str, Any] = {} if name.startswith("lraspp") else {"aux_loss": True}
    return case(divided(name, num_classes=5, weights_backbone=None, **more), lambda b: image(b, 3, 64, 64))


def video_case(name: str) -> Case:
    """Build one classifier of short clips with 5 classes."""
    clip = CLIPS.get(name, CLIP)
    sizes = {"spatial_size": clip[2:], "temporal_size": clip[1]} if name.startswith("mvit") else None
    model = divided(name, sizes, num_classes=5)
    if name == "s3d":
        model.avgpool = nn.AvgPool3d((2, 2, 2), stride=1)  # its window of 7 by 7 is what a picture of 224 leaves
    return case(model, lambda b: image(b, *clip))


def flow_case(name: str) -> Case:
    """Build one estimator of optical flow that refines twice, at the least size its correlation pyramid takes."""

    def frames(batch: int) -> dict[str, Any]:
        return {
            "image1": torch.tanh(image(batch, 3, 128, 128)),
            "image2": torch.tanh(image(batch, 3, 128, 128, seed=3)),
            "num_flow_updates": 2,
        }

    return case(divided(name), frames)


ENTRIES: list[Entry] = [
    Entry(
        f"torchvision/{name}",
        "torchvision",
        lambda name=name, build=build: build(name),
        NEEDS,
        float64=names is not FLOW,  # RAFT makes its grid of coordinates in single precision
    )
    for names, build in (
        (CLASSIFIERS, picture_case),
        (SEGMENTATION, segmentation_case),
        (VIDEO, video_case),
        (FLOW, flow_case),
    )
    for name in names
]
