"""timm models as released, without weights, at about the smallest input at which nothing degenerates.

Widths are the released ones: what is small here is the picture. 64 pixels leave 2 by 2 positions at the usual
stride of 32; a softmax over one position would hide the queries and keys from every comparison.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from .entry import Case, Entry, case, image
from .timm_shim import load

NEEDS = ("timm", "torchvision")

# convolutional ends: any picture size is accepted
FREE = (
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_lite0",
    "densenet121",
    "regnetx_002",
    "regnety_002",
    "resnext26ts",
    "seresnext26ts",
    "repvgg_a0",
    "mobileone_s0",
    "dla34",
    "darknet53",
    "ghostnet_100",
    "ghostnetv2_100",
    "hrnet_w18_small",
    "ese_vovnet19b_dw",
    "inception_next_atto",
    "mobilevit_xxs",
    "starnet_s1",
    "repvit_m0_9",
    "convnext_atto",
    "res2net50_26w_4s",
    "cspresnet50",
    "cspdarknet53",
    "fasternet_t0",
    "skresnet18",
    "dpn48b",
    "poolformer_s12",
    "convformer_s18",
    "edgenext_xx_small",
    "mambaout_femto",
    "nf_resnet50",
    "dm_nfnet_f0",
    "xcit_nano_12_p16_224",
    "pvt_v2_b0",
    "twins_svt_small",
    "shvit_s1",
    "tiny_vit_5m_224",
    "fastvit_t8",
    "efficientvit_b0",
    "sequencer2d_s",
    "rexnet_100",
    "resnest14d",
    "ecaresnet26t",
    "gcresnext26ts",
    "focalnet_tiny_srf",
    "efficientformer_l1",
)
# built for one picture size
SIZED = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "mixer_s32_224",
    "resmlp_12_224",
    "gmlp_ti16_224",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "levit_128s",
    "convit_tiny",
    "eva02_tiny_patch14_224",
    "hiera_tiny_224",
    "visformer_tiny",
)
PIXELS = {
    "mobilevit_xxs": 128,
    "shvit_s1": 128,
    "levit_128s": 128,
    "eva02_tiny_patch14_224": 56,
    "mixer_s32_224": 96,
    "efficientformer_l1": 224,
}
# the one transformer too large for a quick sweep: two of its twelve identical layers
SHORT = {"beit_base_patch16_224": {"depth": 2}}


def _biases(self: Any, device: torch.device) -> torch.Tensor:
    """The relative position biases of an attention layer, computed at every call."""
    return self.attention_biases[:, self.attention_bias_idxs]


def _without_cache(model: nn.Module) -> nn.Module:
    """Take away the cache some layers keep of their biases in eval mode.

    It would hold the values from before the initialisation, tensors of one gradient graph, or a capture's fakes.
    """
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.__dict__["get_attention_biases"] = MethodType(_biases, module)
    return model


def image_case(name: str) -> Case:
    """Build one timm model with 5 classes."""
    size = PIXELS.get(name, 64)
    more: dict[str, Any] = SHORT.get(name, {}) | ({"img_size": size} if name in SIZED else {})
    model = load("timm").create_model(name, pretrained=False, num_classes=5, **more)
    return case(_without_cache(model), lambda b: image(b, 3, size, size), floor=0.25 if name == "levit_128s" else 0.06)


ENTRIES: list[Entry] = [
    Entry(f"timm/{name}", "timm", lambda name=name: image_case(name), NEEDS) for name in FREE + SIZED
]
