"""torchvision's models in the zoo: all of them, in the released depths, and a few removed from; `make sweep` runs the rest."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from graphwright.tools.sweep import sweep_entry
from graphwright.tools.zoo import ZOO, entries
from graphwright.tools.zoo.timm_shim import load
from graphwright.tools.zoo.torchvision_models import CLASSIFIERS, FLOW, SEGMENTATION, VIDEO
from graphwright.tools.zoo.torchvision_widths import DIVISORS, divided

pytestmark = [
    pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize(
    ("package", "names"),
    [("", CLASSIFIERS), ("segmentation", SEGMENTATION), ("video", VIDEO), ("optical_flow", FLOW)],
)
def test_every_model_that_torchvision_lists_is_an_entry(package: str, names: tuple[str, ...]) -> None:
    models = load("torchvision").models
    listed = models.list_models(module=getattr(models, package) if package else models)
    assert sorted(names) == sorted(listed)
    assert {f"torchvision/{name}" for name in names} <= {entry.name for entry in entries(["torchvision"])}


def _kinds(model: Any) -> list[tuple[str, str]]:
    return [(name, type(module).__name__.replace("Narrow", "Bottleneck")) for name, module in model.named_modules()]


@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "densenet169", "efficientnet_b4", "regnet_y_3_2gf", "resnext50_32x4d", "swin_t", "vit_b_32"],
)
def test_divided_widths_leave_every_module_and_most_parameters_gone(name: str) -> None:
    released = load("torchvision").models.get_model(name, weights=None, num_classes=5)
    narrow = divided(name, num_classes=5)
    assert DIVISORS[name] > 1
    assert _kinds(narrow) == _kinds(released)
    count, before = (sum(p.numel() for p in model.parameters()) for model in (narrow, released))
    assert count < 0.6 * before
    assert type(divided(name, num_classes=5)) is type(released)


def test_the_builder_of_torchvision_is_as_it_was_afterwards() -> None:
    resnet = load("torchvision").models.resnet
    before = resnet._resnet
    divided("resnet50", num_classes=5)
    assert resnet._resnet is before


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small"])
def test_three_groups_and_all_groups_at_once_equal_the_mask_oracle(name: str) -> None:
    row = sweep_entry(ZOO[f"torchvision/{name}"], singles=3)
    assert row.wrong == [] and row.raised == []
    assert row.groups > 3 and row.exact + row.renormalised == 4
    assert row.inert == 0
