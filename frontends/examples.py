"""Small random models to try things on, as ``package.module:factory`` names for the command line.

    graphwright groups graphwright.frontends.examples:resnet

Each factory returns ``(module, args, kwargs)`` with the module in evaluation mode. The weights are random, the same for
every call, and the global random state is left as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

SEED = 0


def resnet() -> Example:
    """A ResNet for 32x32 images, 16 to 32 channels wide.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_channels=3)
    config.num_labels = 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ResNetForImageClassification(config).eval()
        _spread_statistics(model)
    return model, (), {"pixel_values": _normal(2, 3, 32, 32), "return_dict": False}


def llama() -> Example:
    """A Llama of two layers, width 48, 6 query heads and 2 key-value heads of 8, vocabulary 64.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,  # with the usual 0.02 the outputs of so narrow a model are next to zero
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(SEED))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return model, (), kwargs


def _spread_statistics(model: nn.Module) -> None:
    """Give batch norms statistics that differ by channel: with fresh ones every channel looks the same."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))
