"""Attributes of modules that state a size, and the values they should have after a removal.

The attribute's name says what it counts, its old value must be a size that occurs inside the module, and the new value
is what that size became. torch's own layers are in `layers`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .sizes import CHANNEL, GROUP, HEAD, HEAD_DIM, INNER, KV_HEAD, VALUE_DIM, SizeChange

# Attribute name to the roles its value may have, best first. Only sizes: never scales, counts of layers or labels.
ROLES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "num_heads num_attention_heads n_heads n_head num_head heads nhead nheads attention_heads n_attn_heads "
            "encoder_attention_heads decoder_attention_heads sliceable_head_dim"
        ).split(),
        (HEAD,),
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads n_kv_heads n_kv_head kv_heads n_head_kv num_multi_query_heads".split(),
        (KV_HEAD, HEAD),
    ),
    **dict.fromkeys("num_key_value_groups num_kv_groups n_rep kv_groups num_queries_per_kv q_per_kv".split(), (GROUP,)),
    **dict.fromkeys(
        (
            "head_dim head_size attention_head_size dim_head d_head dim_per_head size_per_head attn_head_dim "
            "key_value_proj_dim d_kv qk_head_dim hidden_size_per_attention_head"
        ).split(),
        (HEAD_DIM, VALUE_DIM),
    ),
    **dict.fromkeys("v_head_dim value_head_dim value_dim v_dim".split(), (VALUE_DIM,)),
    **dict.fromkeys(
        "all_head_size inner_dim inner_kv_dim attention_dim attn_dim qkv_dim split_size proj_dim".split(),
        (INNER, CHANNEL),
    ),
    **dict.fromkeys(
        (
            "hidden_size embed_dim embedding_dim embedding_size dim dims d_model n_embd width channels in_channels "
            "out_channels num_channels hidden_channels in_features out_features num_features features hidden_dim "
            "hidden_features hidden_width intermediate_size ffn_dim d_ff n_inner mlp_dim input_dim output_dim in_dim "
            "out_dim input_size output_size query_dim cross_attention_dim normalized_shape all_channels nf nx "
            "d_inner d_hidden model_dim feature_size feature_dim"
        ).split(),
        (CHANNEL, INNER),
    ),
}

# Counts that no removal changes; a layer index equal to a head count must not follow it.
NEVER = frozenset(
    (
        "layer_idx layer_id num_layers num_hidden_layers n_layers n_layer depth kernel_size stride padding dilation eps "
        "num_groups scale scaling num_labels num_classes vocab_size padding_idx max_position_embeddings training dropout "
        "patch_size image_size window_size scale_factor num_embeddings softmax_scale sliding_window "
        "chunk_size_feed_forward"
    ).split()
)

Value = int | tuple[int, ...] | list[int]


@dataclass(frozen=True)
class Proposal:
    """A value that an attribute might need.

    Attributes:
        path: Module.
        name: Attribute; ``config.x`` for an entry of the module's configuration object.
        value: New value.
        sure: Whether name and sizes leave no other choice.
    """

    path: str
    name: str
    value: Value
    sure: bool

    def __str__(self) -> str:
        return f"{self.path or '<root>'}.{self.name} = {self.value}"


def is_size(value: object) -> bool:
    """Whether ``value`` is an int, or a non-empty tuple or list of ints (booleans are none)."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(v) is int for v in value)
    return type(value) is int


def proposals(path: str, name: str, value: Value, changes: list[SizeChange]) -> list[Proposal]:
    """Return the values that attribute ``name`` may need, most likely first; none where nothing of its size changed.

    One of them may be the value it has: a size that occurs twice and was reduced once.

    Args:
        path: Of the module.
        name: Of the attribute, without the configuration object it may be in.
        value: It has now.
        changes: Sizes inside the module.
    """
    short = name.rpartition(".")[2]
    if short in NEVER or short.startswith("__"):
        return []
    if isinstance(value, (tuple, list)):
        new = [proposals(path, name, v, changes) for v in value]
        if not any(new):
            return []
        picked = [p[0].value if p else v for p, v in zip(new, value, strict=True)]
        sure = all(p[0].sure for p in new if p)
        return [Proposal(path, name, type(value)(picked), sure)]  # type: ignore[arg-type]
    found = [change for change in changes if change.old == value]
    roles = ROLES.get(short)
    if roles is None:
        ranked, sure = found, False
    else:
        fitting = [c for role in roles for c in found if c.role == role]
        best = [c for c in fitting if c.role == fitting[0].role]
        sure = len({c.new for c in best}) == 1 and any(c.direct for c in best)
        ranked = [*fitting, *(c for c in found if c not in fitting)]
    options = list(dict.fromkeys(c.new for c in ranked))
    if not options or options == [value]:
        return []
    return [Proposal(path, name, new, sure and i == 0) for i, new in enumerate(options)]


# ------------------------------------------------------------------ reading and setting


def sizes_of(module: nn.Module) -> Iterator[tuple[str, Value]]:
    """Yield the attributes of ``module`` that are sizes, those of its configuration object as ``config.x``."""
    for name, value in vars(module).items():
        if is_size(value) and name not in NEVER:
            yield name, value
    for name, value in _config_items(module):
        if is_size(value) and name not in NEVER:
            yield f"config.{name}", value


def _config_items(module: nn.Module) -> list[tuple[str, Any]]:
    config = config_of(module)
    if config is None:
        return []
    return list(config.items()) if isinstance(config, dict) else list(vars(config).items())


def config_of(module: nn.Module) -> Any:
    """Return the configuration object (or dictionary) of a module; None where it has none."""
    config = vars(module).get("config", vars(module).get("_internal_dict"))
    return config if isinstance(config, dict) or hasattr(config, "__dict__") else None


def get_size(module: nn.Module, name: str) -> Value | None:
    """Return the size attribute ``name`` (``config.x`` for a configuration entry); None where there is no such size."""
    prefix, _, key = name.rpartition(".")
    if prefix == "config":
        value = dict(_config_items(module)).get(key)
    else:
        value = vars(module).get(name)
    return value if is_size(value) else None


def set_size(module: nn.Module, name: str, value: Value) -> None:
    """Set a size attribute. A configuration entry is set in a copy of the configuration, which others may share."""
    prefix, _, key = name.rpartition(".")
    if prefix != "config":
        setattr(module, name, value)
        return
    config = config_of(module)
    slot = "config" if "config" in vars(module) else "_internal_dict"
    if isinstance(config, dict):
        setattr(module, slot, type(config)({**config, key: value}))
        return
    changed = copy.copy(config)
    setattr(changed, key, value)
    setattr(module, slot, changed)
