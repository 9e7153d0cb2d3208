"""Published pruned ResNets that need real scores: do their two figures fit together?

Under isomorphic ranking the inner widths of all stages are one class, so scores decide which stage loses how much, and random
ones meet neither figure. Here weights are drawn, their squares are the scores, and those of later stages are raised by one
common factor a stage until the multiply-accumulates are the published ones; the parameters that come with that are compared
with the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...graph.cost import parameter_count
from ...passes.base import Pipeline
from ...passes.remove_channels import RemoveChannels
from .published_macs import printed_macs
from .published_networks import NETWORKS, Network, Setting

STEPS = 6


def tilted(networks: Sequence[Network] = NETWORKS, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a row for every pair of parameters and multiply-accumulates of a ResNet under isomorphic ranking."""
    for network in networks:
        for setting in network.settings:
            isomorphic = (setting.options or {}).get("scope") == "isomorphic"
            if network.name.startswith("ResNet") and isomorphic and setting.parameters and setting.macs:
                yield _row(network, setting, seed)


def _row(network: Network, setting: Setting, seed: int) -> dict[str, Any]:
    sizes = _sizes(network, setting, seed)
    factor, (parameters, macs) = least_factor(sizes, float(setting.macs))
    without = sizes(1.0)
    row = {"network": network.name, "setting": setting.name, "factor": round(factor, 5)}
    row |= {"published M": setting.parameters, "ours M": round(parameters, 2), "without M": round(without[0], 2)}
    return row | {"published G": setting.macs, "ours G": round(macs, 3), "without G": round(without[1], 3)}


def least_factor(sizes: Callable[[float], tuple[float, float]], macs: float) -> tuple[float, tuple[float, float]]:
    """Return the factor, found by bisection, at which ``sizes`` has at most ``macs``, and its sizes there."""
    low, high = 1.0, 1.002
    while sizes(high)[1] > macs:
        low, high = high, 1 + 2 * (high - 1)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sizes(middle)[1] > macs else (low, middle)
    return high, sizes(high)


def _sizes(network: Network, setting: Setting, seed: int) -> Callable[[float], tuple[float, float]]:
    """Return a function from the factor to what is left: millions of parameters, milliards of multiply-accumulates."""
    program = replace(network, weights=True).program()
    weights = {name: p for name, p in program.parameters().items() if p.dim() == 4}
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5 for name, p in weights.items()}
    step = RemoveChannels(criterion="magnitude-l2", reduction="first", **(setting.options or {}))
    known: dict[float, tuple[float, float]] = {}

    def sizes(factor: float) -> tuple[float, float]:
        if factor not in known:
            for name, p in weights.items():
                stage = re.search(r"stages\.(\d)", name)
                p.data.copy_(drawn[name] * factor ** (int(stage.group(1)) if stage else 0))
            smaller = Pipeline([step])(program).program
            known[factor] = parameter_count(smaller) / 1e6, printed_macs(smaller) / 1e9
        return known[factor]

    return sizes
