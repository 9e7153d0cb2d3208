"""Residual blocks: which branches go together, by what they are in known architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.blocks import Blocks, residual_blocks
from graphwright.tools.zoo import ZOO


def blocks_of(name: str) -> Blocks:
    entry = ZOO[name]
    for library in entry.requires:
        pytest.importorskip(library)
    case = entry.build()
    return residual_blocks(capture(case.model, case.args, case.kwargs, case.dynamic))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("nano_gpt", {"blocks.0": 2, "blocks.1": 2}),
        # Norms behind the additions, and attention without a module that holds its addition.
        ("transformer_encoder", {"enc.layers.0": 2, "enc.layers.1": 2}),
        # The additions are in modules of their own below the layer; cross-attention.
        ("t5_full", {f"{side}.block.{i}": 2 + (side == "decoder") for side in ("encoder", "decoder") for i in (0, 1)}),
        # Two streams that one attention joins.
        ("sd3", {"transformer_blocks.0": 4, "transformer_blocks.1": 2}),
        # Attention and feed-forward side by side.
        ("falcon", {"transformer.h.0": 2, "transformer.h.1": 2}),
        ("hf_resnet_bottleneck", {"resnet.encoder.stages.0.layers.1": 1, "resnet.encoder.stages.1.layers.1": 1}),
    ],
)
def test_a_block_is_what_people_call_a_layer(name: str, names: dict[str, int]) -> None:
    found = blocks_of(name).blocks
    assert {block.name: len(block.branches) for block in found} == names
    assert not any(block.cut.refused for block in found)
    assert [block.number for block in found] == list(range(len(found)))
    assert sorted(i for block in found for i in block.branches) == list(range(sum(names.values())))


def test_every_call_of_one_module_is_a_block() -> None:
    found = blocks_of("albert").blocks
    assert len(found) == 2 and len({block.name for block in found}) == 1
    assert [block.branches for block in found] == [(0, 1), (2, 3)]


def test_a_returned_cache_refuses_the_layers_that_fill_it() -> None:
    found = blocks_of("raises/use_cache").blocks
    assert [block.name for block in found] == ["model.model.layers.0", "model.model.layers.1"]
    assert all("others need layers of it" in block.cut.refused and "k_proj" in block.cut.refused for block in found)


def test_modules_of_a_blocks_class_that_change_the_stream_are_listed() -> None:
    others = blocks_of("hf_resnet_bottleneck").others
    assert list(others) == ["resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.1.layers.0"]


def test_layers_in_a_loop_without_a_module_are_blocks_by_themselves() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = x + layer(x.relu())
            return x

    found = residual_blocks(capture(Loop().eval(), (torch.randn(2, 6),))).blocks
    assert [block.name for block in found] == ["layers.0", "layers.1", "layers.2"]
    assert [block.tensors for block in found] == [(f"layers.{i}.bias", f"layers.{i}.weight") for i in range(3)]
