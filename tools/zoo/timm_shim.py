"""Let timm import beside a torch for which torchvision's compiled operators are not available.

timm imports torchvision, whose Python part refuses to load when the operators it refers to are not registered. No
classification model calls one of them, so it is enough to declare their schemas. Where the compiled operators exist,
or torchvision is not installed, nothing happens.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from types import ModuleType

import torch

_BOX = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
_BACK = "Tensor grad, Tensor rois"
_SIZE = "float spatial_scale, int pooled_height, int pooled_width"
_IN = "int batch_size, int channels, int height, int width"
_DEFORM = (
    "Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, SymInt pad_h, "
    "SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask"
)
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_BOX}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward({_BACK}, {_SIZE}, {_IN}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_BOX}) -> (Tensor, Tensor)",
    f"_roi_pool_backward({_BACK}, Tensor argmax, {_SIZE}, {_IN}) -> Tensor",
    f"ps_roi_align({_BOX}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward({_BACK}, Tensor channel_mapping, {_SIZE}, int sampling_ratio, {_IN}) -> Tensor",
    f"ps_roi_pool({_BOX}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward({_BACK}, Tensor channel_mapping, {_SIZE}, {_IN}) -> Tensor",
    f"deform_conv2d(Tensor input, {_DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

_library: torch.library.Library | None = None  # the declarations live as long as this object


def _compiled() -> bool:
    """Whether torchvision brings operators that load with this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    found = importlib.machinery.PathFinder.find_spec("_C", list(spec.submodule_search_locations))
    if found is None or found.origin is None:
        return False
    try:
        torch.ops.load_library(found.origin)
    except (OSError, RuntimeError):
        return False
    return hasattr(torch.ops.torchvision, "nms")


def install() -> bool:
    """Declare the schemas if, and only if, torchvision is present without working operators.

    Returns:
        Whether declarations were made, now or earlier.
    """
    global _library
    if _library is not None:
        return True
    if importlib.util.find_spec("torchvision") is None or hasattr(torch.ops.torchvision, "nms") or _compiled():
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        _library.define(schema)
    return True


def load(name: str) -> ModuleType:
    """Import a model library; transformers and diffusers, too, import torchvision where they find it."""
    install()
    return importlib.import_module(name)
