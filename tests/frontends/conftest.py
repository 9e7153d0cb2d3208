"""Small models of six library classes, captured and pruned once per session, for the tests of write-back and saving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import DepGraph, depgraph
from graphwright.graph.groups import CouplingGroup
from graphwright.graph.program import Program
from graphwright.graph.resize import RemovalRecord, resize
from graphwright.tools.zoo import timm_shim

timm_shim.install()  # lets transformers import beside a torchvision without compiled operators

VOCABULARY = 61
LABELS = {i: str(i) for i in range(5)}


@dataclass(frozen=True)
class Pruned:
    """A module, the program captured from it, and the program after about half of every group is gone."""

    model: Any
    kwargs: dict[str, Any]
    original: Program
    program: Program
    record: RemovalRecord
    groups: tuple[CouplingGroup, ...]


def half(graph: DepGraph, seed: int = 0, kinds: tuple[str, ...] | None = None) -> dict[str, list[int]]:
    """Choose at random which half of each group stays."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        left = group.legal_keep(max(1, group.size // 2))
        if left < group.size and (kinds is None or group.kind in kinds):
            keep[group.name] = sorted(torch.randperm(group.size, generator=generator)[:left].tolist())
    return keep


def prune(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic: Any = None,
    keep: Callable[[DepGraph], dict[str, Any]] = half,
) -> Pruned:
    """Capture ``model`` and remove what ``keep`` does not name."""
    original = capture(model, args, kwargs, dynamic)
    program = original.copy()
    graph = depgraph(program)
    record = resize(program, keep(graph), graph)
    return Pruned(model, kwargs or {}, original, program, record, graph.groups)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    """Build a module whose every weight counts: no zeros, no statistics alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point() and tensor.dim() == 1 and float(tensor.std(unbiased=False)) == 0:
                    tensor += 0.3 * torch.rand(tensor.shape)
                elif tensor.is_floating_point() and float(tensor.abs().max()) == 0:
                    tensor.normal_(std=0.2)
    return model


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _llama(batch: int) -> tuple[nn.Module, dict[str, Any], Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    dynamic = {"input_ids": {0: "batch", 1: "tokens"}}
    return seeded(lambda: LlamaForCausalLM(config)), {"input_ids": ids(batch, 9)}, dynamic


def _bert(batch: int) -> tuple[nn.Module, dict[str, Any], Any]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=32,
        id2label=LABELS,
        initializer_range=0.2,
        pad_token_id=0,
    )
    tokens = ids(batch, 9)
    kwargs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return seeded(lambda: BertForSequenceClassification(config)), kwargs, None


def _vit(batch: int) -> tuple[nn.Module, dict[str, Any], Any]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=16,
        patch_size=8,
        id2label=LABELS,
        initializer_range=0.2,
    )
    return seeded(lambda: ViTForImageClassification(config)), {"pixel_values": normal(batch, 3, 16, 16)}, None


def _resnet(batch: int) -> tuple[nn.Module, dict[str, Any], Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16], depths=[2, 1, 1], layer_type="bottleneck", id2label=LABELS
    )
    return seeded(lambda: ResNetForImageClassification(config)), {"pixel_values": normal(batch, 3, 16, 16)}, None


def _unet(batch: int) -> tuple[nn.Module, dict[str, Any], Any]:
    from diffusers.models.unets.unet_2d import UNet2DModel

    def build() -> nn.Module:
        return UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    timestep = torch.arange(3, 3 + batch)
    return seeded(build), {"sample": normal(batch, 3, 8, 8), "timestep": timestep, "return_dict": False}, None


def _conditional_unet(batch: int) -> tuple[nn.Module, dict[str, Any], Any]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    def build() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    kwargs = {
        "sample": normal(batch, 4, 8, 8),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_hidden_states": normal(batch, 7, 24, seed=2),
    }
    return seeded(build), kwargs, None


BUILDERS = {
    "llama": _llama,
    "bert": _bert,
    "vit": _vit,
    "resnet": _resnet,
    "unet": _unet,
    "conditional_unet": _conditional_unet,
}


@cache
def pruned_model(name: str) -> Pruned:
    """Build, capture and prune one of the six, once."""
    model, kwargs, dynamic = BUILDERS[name](2)
    return prune(model, (), kwargs, dynamic)


@cache
def written_model(name: str) -> Any:
    """Write the removal back to one of the six, once. Not to be changed: copy it first."""
    from graphwright.frontends.write_back import write_back

    case = pruned_model(name)
    return write_back(case.model, case.program, case.record)


@pytest.fixture(scope="session")
def pruned() -> Callable[[str], Pruned]:
    return pruned_model


@pytest.fixture(scope="session")
def written() -> Callable[[str], Any]:
    return written_model


@pytest.fixture(scope="session")
def tools() -> Any:
    """The helpers above, for tests that make their own models."""
    from types import SimpleNamespace

    return SimpleNamespace(prune=prune, seeded=seeded, half=half, normal=normal, ids=ids, builders=BUILDERS)
