"""Hugging Face transformers, tiny configurations with distinct sizes.

Text models share these sizes: width 42, feed-forward 56, 6 query heads of 8 where the head size is free, vocabulary
61. Models that derive the head size from the width use width 48 with 6 heads of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entry import Case, Entry, case, image, tokens
from .timm_shim import load

NEEDS = ("transformers",)
VOCAB = 61
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make(model: str, config: str, package: str | None = None, /, **values: Any) -> nn.Module:
    """Build a transformers model by the names of its classes; a cache is never returned."""
    library = load(package or "transformers")
    built = getattr(library, config)(**values)
    built.use_cache = False
    return getattr(library, model)(built)


def text(model: nn.Module, *, mask: bool = True, dynamic: dict[str, Any] | None = None, seed: int = 0) -> Case:
    """Token inputs (batch, 9), with an attention mask of ones unless told otherwise."""

    def inputs(b: int) -> dict[str, torch.Tensor]:
        ids = tokens(b, 9, VOCAB)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if mask else {"input_ids": ids}

    return case(model, inputs, dynamic=dynamic, seed=seed)


def llama(kv: int, heads: int = 6, attention: str = "sdpa", mask: bool = True, **more: Any) -> Callable[[], Case]:
    """Llama with a choice of key/value heads; the head size (8) is not width / heads."""
    width = 7 * heads

    def build() -> Case:
        values = dict(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=8,
            attn_implementation=attention,
            max_position_embeddings=32,
            **SPECIAL,
        )
        return text(make("LlamaForCausalLM", "LlamaConfig", **(values | more)), mask=mask)

    return build


def decoder(name: str, config: str = "", **more: Any) -> Callable[[], Case]:
    """A Llama-shaped causal model of another name: width 42, 6 query heads of 8, 2 key/value heads."""

    def build() -> Case:
        values = dict(
            vocab_size=VOCAB,
            hidden_size=42,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=32,
            **SPECIAL,
        )
        return text(make(f"{name}ForCausalLM", config or f"{name}Config", **(values | more)))

    return build


def gpt2() -> Case:
    """GPT-2: fused qkv and Conv1D weights stored (in, out), tied embeddings."""
    return text(
        make(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=2,
            n_head=6,
            n_inner=56,
            n_positions=16,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bert(model: str = "BertForSequenceClassification", config: str = "BertConfig", **more: Any) -> Callable[[], Case]:
    """A BERT-shaped encoder with a classifier of 5 labels."""

    def build() -> Case:
        values = dict(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=32,
            num_labels=5,
            pad_token_id=0,
        )
        return text(make(model, config, **(values | more)))

    return build


def distilbert() -> Case:
    """DistilBERT names its sizes differently."""
    return text(
        make(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=48,
            n_heads=6,
            hidden_dim=56,
            n_layers=2,
            max_position_embeddings=32,
            num_labels=5,
        )
    )


def gpt_neox(**more: Any) -> Case:
    """GPT-NeoX: fused qkv laid out per head, a quarter of each head rotated, parallel residual."""
    return text(
        make(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            vocab_size=VOCAB,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=56,
            max_position_embeddings=32,
            **SPECIAL,
            **more,
        )
    )


def bloom() -> Case:
    """BLOOM: fused qkv laid out per head, ALiBi built from the number of heads, tied embeddings."""
    return text(
        make(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCAB,
            hidden_size=48,
            n_layer=2,
            n_head=6,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def opt(**more: Any) -> Case:
    """OPT: learned positions, tied embeddings; word_embed_proj_dim adds projections around the stream."""
    values = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        ffn_dim=56,
        max_position_embeddings=32,
        word_embed_proj_dim=48,
        **SPECIAL,
    )
    return text(make("OPTForCausalLM", "OPTConfig", **(values | more)))


def t5(encoder: bool, gated: bool = False) -> Callable[[], Case]:
    """T5: one relative position table per stack, head size (8) free of the width (40)."""

    def build() -> Case:
        model = make(
            "T5EncoderModel" if encoder else "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=40,
            d_kv=8,
            d_ff=56,
            num_layers=2,
            num_heads=6,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
        )
        if encoder:
            return text(model)
        return case(model, lambda b: {"input_ids": tokens(b, 9, VOCAB), "decoder_input_ids": tokens(b, 7, VOCAB, 5)})

    return build


def whisper(encoder: bool) -> Callable[[], Case]:
    """Whisper: two convolutions in front of the encoder, 20 frames, keys without bias."""

    def build() -> Case:
        values = dict(
            vocab_size=VOCAB,
            num_mel_bins=5,
            encoder_layers=2,
            encoder_attention_heads=6,
            decoder_layers=2,
            decoder_attention_heads=6,
            encoder_ffn_dim=56,
            decoder_ffn_dim=52,
            d_model=48,
            max_source_positions=10,
            max_target_positions=12,
            decoder_start_token_id=3,
            **SPECIAL,
        )
        if encoder:
            model = make("WhisperEncoder", "WhisperConfig", "transformers.models.whisper.modeling_whisper", **values)
            return case(model, lambda b: {"input_features": image(b, 5, 20)})
        return case(
            make("WhisperForConditionalGeneration", "WhisperConfig", **values),
            lambda b: {"input_features": image(b, 5, 20), "decoder_input_ids": tokens(b, 7, VOCAB)},
        )

    return build


def mixtral() -> Case:
    """Mixtral: 4 experts, 2 per token; the grouped product wants widths that are multiples of 4."""
    return decoder("Mixtral", hidden_size=60, num_local_experts=4, num_experts_per_tok=2, head_dim=8)()


def mamba() -> Case:
    """Mamba: selective state space, fused input projection split in two, state size 4."""
    return text(
        make(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCAB,
            hidden_size=20,
            state_size=4,
            num_hidden_layers=2,
            expand=2,
            conv_kernel=3,
            time_step_rank=5,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        mask=False,
    )


def clip() -> Case:
    """CLIP: two towers of different widths into one projection, logits of images against texts."""
    model = make(
        "CLIPModel",
        "CLIPConfig",
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=12,
            **SPECIAL,
        ),
        vision_config=dict(
            hidden_size=48,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=6,
            image_size=16,
            patch_size=8,
        ),
        projection_dim=10,
    )
    return case(
        model,
        lambda b: {
            "input_ids": tokens(b, 9, VOCAB),
            "pixel_values": image(b, 3, 16, 16),
            "attention_mask": torch.ones(b, 9, dtype=torch.long),
        },
    )


ENTRIES: list[Entry] = [
    Entry(name, "transformers", build, NEEDS, note, float64=name != "mixtral")
    for name, build, note in (
        ("llama_mha", llama(6), "rotary, key/value heads as many as query heads"),
        ("llama_gqa", llama(2), "2 key/value heads, 3 query heads each"),
        ("llama_gqa_4_2", llama(2, 4), ""),
        ("llama_mqa", llama(1), "one key/value head"),
        ("llama_eager", llama(2, attention="eager"), "matmul and softmax"),
        ("llama_no_mask", llama(2, mask=False), "adds the packed-sequence detection"),
        ("llama_bias_tied", llama(2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), ""),
        ("mistral", decoder("Mistral", head_dim=8, sliding_window=4), "sliding window"),
        ("qwen2", decoder("Qwen2", hidden_size=48), "biases on q, k and v"),
        ("qwen3", decoder("Qwen3", head_dim=8), "norms over the head size"),
        ("gemma", decoder("Gemma", head_dim=8), "tied, embeddings scaled by the square root of the width"),
        ("gemma2", decoder("Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=4), "soft caps"),
        ("phi3", decoder("Phi3", hidden_size=48), "fused qkv and fused gate/up"),
        ("mixtral", mixtral, "mixture of experts"),
        ("gpt2", gpt2, "Conv1D"),
        ("gpt_neox", gpt_neox, "per-head qkv, partial rotary"),
        ("gpt_neox_full_rotary", lambda: gpt_neox(rotary_pct=1.0), ""),
        ("bloom", bloom, "per-head qkv, ALiBi"),
        ("opt", opt, ""),
        ("opt_proj", lambda: opt(word_embed_proj_dim=20, do_layer_norm_before=False), "as in OPT-350m"),
        ("bert", bert(), ""),
        ("distilbert", distilbert, ""),
        ("t5_encoder", t5(True), ""),
        ("t5_full", t5(False), "tied embeddings"),
        ("t5_gated", t5(False, True), "gated feed-forward, untied"),
        ("whisper_encoder", whisper(True), ""),
        ("whisper_full", whisper(False), ""),
        ("mamba", mamba, "state space"),
        ("clip", clip, "two towers"),
    )
]
