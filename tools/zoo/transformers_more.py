"""Further Hugging Face text models: encoders, decoders with other attention layouts, sequence to sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .entry import Case, Entry, case, tokens
from .transformers_models import NEEDS, SPECIAL, VOCAB, bert, decoder, make, text


def gptj() -> Case:
    """GPT-J: rotary over interleaved pairs of part of the head, parallel residual, no biases on q, k and v."""
    return text(
        make(
            "GPTJForCausalLM",
            "GPTJConfig",
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=2,
            n_head=6,
            n_positions=16,
            rotary_dim=4,
            n_inner=56,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def codegen() -> Case:
    """CodeGen: qkv fused in four blocks."""
    return text(
        make(
            "CodeGenForCausalLM",
            "CodeGenConfig",
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=2,
            n_head=4,
            n_positions=16,
            n_ctx=16,
            rotary_dim=4,
            n_inner=56,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt_neo() -> Case:
    """GPT-Neo: global and local attention in turn, no scale, learned positions."""
    return text(
        make(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            vocab_size=VOCAB,
            hidden_size=48,
            num_layers=2,
            num_heads=6,
            attention_types=[[["global", "local"], 1]],
            intermediate_size=56,
            window_size=4,
            max_position_embeddings=16,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bigcode() -> Case:
    """StarCoder's GPT-2 with one key/value head inside a fused projection."""
    return text(
        make(
            "GPTBigCodeForCausalLM",
            "GPTBigCodeConfig",
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=2,
            n_head=6,
            n_inner=56,
            n_positions=16,
            multi_query=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def falcon(new: bool) -> Callable[[], Case]:
    """Falcon: fused qkv, multi-query, or grouped per key/value head (the new decoder architecture)."""

    def build() -> Case:
        return text(
            make(
                "FalconForCausalLM",
                "FalconConfig",
                vocab_size=VOCAB,
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_kv_heads=2 if new else None,
                new_decoder_architecture=new,
                multi_query=True,
                parallel_attn=True,
                bias=False,
                alibi=False,
                ffn_hidden_size=56,
                bos_token_id=1,
                eos_token_id=2,
            )
        )

    return build


def mpt() -> Case:
    """MPT: fused qkv, ALiBi, no biases."""
    return text(
        make(
            "MptForCausalLM",
            "MptConfig",
            vocab_size=VOCAB,
            d_model=48,
            n_heads=6,
            n_layers=2,
            expansion_ratio=2,
            max_seq_len=16,
        )
    )


def mamba2() -> Case:
    """Mamba 2: heads of a state-space layer, groups of state projections."""
    return text(
        make(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            vocab_size=VOCAB,
            hidden_size=20,
            state_size=4,
            head_dim=8,
            num_heads=5,
            n_groups=1,
            expand=2,
            conv_kernel=3,
            num_hidden_layers=2,
            chunk_size=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        mask=False,
    )


def deepseek() -> Case:
    """DeepSeek-V3: compressed keys and values, head sizes 10 (of which 4 rotary) for q and k, 6 for v."""
    return text(
        make(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            vocab_size=VOCAB,
            hidden_size=36,
            num_hidden_layers=2,
            intermediate_size=56,
            moe_intermediate_size=20,
            num_attention_heads=3,
            num_key_value_heads=3,
            n_shared_experts=1,
            n_routed_experts=4,
            routed_scaling_factor=1.5,
            kv_lora_rank=14,
            q_lora_rank=18,
            qk_rope_head_dim=4,
            v_head_dim=6,
            qk_nope_head_dim=6,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            max_position_embeddings=32,
            **SPECIAL,
        )
    )


def seq2seq(model: str, config: str, **values: Any) -> Callable[[], Case]:
    """Encoder and decoder of different feed-forward sizes with cross attention."""

    def build() -> Case:
        sizes = dict(
            vocab_size=VOCAB,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=6,
            decoder_attention_heads=4,
            encoder_ffn_dim=56,
            decoder_ffn_dim=52,
            max_position_embeddings=16,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
            **SPECIAL,
        )
        return case(
            make(model, config, **(sizes | values)),
            lambda b: {
                "input_ids": tokens(b, 9, VOCAB),
                "decoder_input_ids": tokens(b, 7, VOCAB, 5),
                "attention_mask": torch.ones(b, 9, dtype=torch.long),
            },
        )

    return build


def fnet() -> Case:
    """FNet: Fourier transforms over positions and features instead of attention."""
    return text(
        make(
            "FNetForSequenceClassification",
            "FNetConfig",
            vocab_size=VOCAB,
            hidden_size=48,
            num_labels=5,
            num_hidden_layers=2,
            intermediate_size=56,
            max_position_embeddings=16,
            pad_token_id=0,
        ),
        mask=False,
    )


def deberta() -> Case:
    """DeBERTa-v2: disentangled attention between contents and relative positions."""
    return text(
        make(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            vocab_size=VOCAB,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=56,
            max_position_embeddings=16,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
            num_labels=5,
            pad_token_id=0,
        )
    )


def xlnet() -> Case:
    """XLNet: relative positions with per-head biases, weights stored (width, heads, head size)."""
    model = make(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        vocab_size=VOCAB,
        d_model=48,
        n_layer=2,
        n_head=6,
        d_inner=56,
        num_labels=5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return case(
        model, lambda b: {"input_ids": tokens(b, 9, VOCAB), "token_type_ids": torch.arange(9).expand(b, 9) // 5}
    )


ENTRIES: list[Entry] = [
    Entry(name, "transformers", build, NEEDS, note, float64=name not in ("qwen2_moe", "deepseek_v3"))
    for name, build, note in (
        (
            "gemma3",
            decoder(
                "Gemma3",
                "Gemma3TextConfig",
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "",
        ),
        ("phi", decoder("Phi", hidden_size=48, partial_rotary_factor=0.5), "partial rotary, parallel residual"),
        ("stablelm", decoder("StableLm", hidden_size=48, partial_rotary_factor=0.25), "partial rotary"),
        ("olmo2", decoder("Olmo2", hidden_size=48), "norms over all heads of q and k"),
        ("cohere", decoder("Cohere", hidden_size=48), "parallel residual, interleaved rotary, tied"),
        ("starcoder2", decoder("Starcoder2", hidden_size=48, sliding_window=None), "layer norm, plain feed-forward"),
        (
            "granite",
            decoder(
                "Granite",
                hidden_size=48,
                embedding_multiplier=1.5,
                residual_multiplier=0.7,
                attention_multiplier=0.3,
                logits_scaling=0.9,
            ),
            "stored scales",
        ),
        ("glm", decoder("Glm", head_dim=8, partial_rotary_factor=0.5), "interleaved partial rotary, fused gate/up"),
        ("smollm3", decoder("SmolLM3", hidden_size=48, no_rope_layers=[1, 0]), "a layer without positions"),
        ("nemotron", decoder("Nemotron", hidden_size=48, partial_rotary_factor=0.5), "squared rectifier"),
        (
            "qwen2_moe",
            decoder(
                "Qwen2Moe",
                hidden_size=48,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=20,
                shared_expert_intermediate_size=24,
            ),
            "shared expert",
        ),
        ("deepseek_v3", deepseek, "latent attention, value size not key size"),
        ("gptj", gptj, ""),
        ("codegen", codegen, ""),
        ("gpt_neo", gpt_neo, ""),
        ("gpt_bigcode", bigcode, "multi-query, fused"),
        ("falcon", falcon(False), "multi-query, fused"),
        ("falcon_grouped", falcon(True), "grouped, fused per key/value head"),
        ("mpt", mpt, "fused qkv, ALiBi"),
        ("mamba2", mamba2, ""),
        ("roberta", bert("RobertaForSequenceClassification", "RobertaConfig", max_position_embeddings=34), ""),
        (
            "electra",
            bert("ElectraForSequenceClassification", "ElectraConfig", embedding_size=20),
            "projected embeddings",
        ),
        ("albert", bert("AlbertForSequenceClassification", "AlbertConfig", embedding_size=20), "one layer used twice"),
        ("bert_mlm", bert("BertForMaskedLM"), "tied embeddings"),
        (
            "squeezebert",
            bert(
                "SqueezeBertForSequenceClassification",
                "SqueezeBertConfig",
                embedding_size=48,
                q_groups=2,
                k_groups=2,
                v_groups=2,
                post_attention_groups=1,
                intermediate_groups=2,
                output_groups=2,
            ),
            "grouped 1-D convolutions",
        ),
        ("fnet", fnet, "Fourier mixing"),
        ("deberta_v2", deberta, "disentangled attention"),
        ("xlnet", xlnet, "relative positions"),
        ("bart", seq2seq("BartForConditionalGeneration", "BartConfig"), ""),
        ("pegasus", seq2seq("PegasusForConditionalGeneration", "PegasusConfig"), "sinusoidal positions"),
    )
]
