"""Every operator with an entry in the table of rules is covered by a commutation test, or listed here with the reason."""

from __future__ import annotations

import importlib

import torch

from graphwright.graph.rules import ATEN

FAMILIES = (
    "elementwise",
    "linear",
    "convolution",
    "normalisation",
    "attention",
    "reduction",
    "shape",
    "cutting",
    "indexing",
    "creation",
    "recurrent",
)
NOT_RUN = {
    "convolution_overrideable": "only foreign devices have a kernel; same schema and rule as convolution",
    "cudnn_batch_norm": "needs cuDNN; the rule of native_batch_norm",
}


def covered() -> set[str]:
    names: set[str] = set()
    for family in FAMILIES:
        names |= importlib.import_module(f"test_rules_{family}").covered()
    return names


def test_every_rule_is_covered() -> None:
    assert ATEN.keys() - covered() == NOT_RUN.keys()


def test_nothing_covered_lost_its_rule() -> None:
    assert covered() <= ATEN.keys()


def test_rules_are_of_operators_that_exist() -> None:
    assert not [n for n in ATEN if not (hasattr(torch.ops.aten, n) or hasattr(torch.ops.aten, f"{n}_"))]
