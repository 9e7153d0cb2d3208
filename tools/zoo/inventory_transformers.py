"""Inventories of the transformers text and speech models, from the configurations in this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .inventory_parts import Axes

LAYERS = 2  # of every model here
FEED = 56  # feed-forward width unless stated


def causal(width: int, kv: int, rep: int, *, rotary: int = 8, size: int = 8, feed: int = FEED) -> Axes:
    """A decoder with rotary positions.

    Args:
        width: of the stream: embedding, norms, projections and the head's input, tied or not.
        kv: key/value heads.
        rep: query heads per key/value head.
        rotary: rotated part of the head; it pairs up, and all layers read one table.
        size: of the head.
        feed: feed-forward width; gate and up projection share it, fused or not.
    """
    axes = Axes()
    axes.hidden(width)
    axes.hidden(feed, times=LAYERS)
    axes.heads(kv, rep, times=LAYERS)
    axes.sizes(rotary // 2, 0)  # rotated pairs, once for all layers
    axes.sizes(size - rotary, size, times=LAYERS)  # what passes unrotated; values
    return axes


def mixture(width: int, feed: int, shared: int = 0) -> Axes:
    """Experts hold their weights in one tensor per layer: they have one hidden axis. The router's choice is fixed."""
    axes = causal(width, 2, 3, feed=feed)
    if shared:
        axes.hidden(shared, times=LAYERS)  # the expert that all tokens use
    return axes


def gemma3() -> Axes:
    """Sliding and full layers have rotary tables of their own."""
    axes = causal(42, 2, 3)
    axes.sizes(8 // 2, 0)  # the second table
    return axes


def smollm3() -> Axes:
    """The second layer has no positions: its query/key size is a plain axis."""
    axes = causal(48, 2, 3)  # the first layer alone reads the table
    axes.sizes(8, 0)
    return axes


def learned(width: int = 48, heads: int = 6, feed: int = FEED) -> Axes:
    """A decoder or encoder with learned positions and plain attention."""
    axes = Axes()
    axes.hidden(width)  # token and position embeddings, stream, head's input
    axes.hidden(feed, times=LAYERS)
    axes.attention(heads, width // heads, width // heads, times=LAYERS)
    return axes


def classifier(embedding: int = 0, layers: int = LAYERS) -> Axes:
    """BERT and its relatives: a dense layer (pooler or head) before the classifier."""
    axes = Axes()
    axes.hidden(48)  # stream
    axes.hidden(48)  # pooler, or first layer of the head
    if embedding:
        axes.hidden(embedding)  # narrow embeddings before their projection
    axes.hidden(FEED, times=layers)
    axes.attention(6, 8, 8, times=layers)  # a layer used twice counts once: `layers` are weights
    return axes


def alibi(feed: int) -> Axes:
    """BLOOM and MPT: slopes for the heads are computed once from their number and read by all layers."""
    axes = Axes()
    axes.hidden(48)
    axes.hidden(feed, times=LAYERS)
    axes.heads(6)  # one axis; the table is computed from constants
    axes.sizes(8, 8, times=LAYERS)
    return axes


def opt(projection: int = 0) -> Axes:
    """OPT; the small embedding of OPT-350m is tied to the head, so the last projection ends on it."""
    axes = learned()
    if projection:
        axes.hidden(projection)
    return axes


def gpt_bigcode() -> Axes:
    """One key/value head, learned positions."""
    axes = Axes()
    axes.hidden(48)
    axes.hidden(FEED, times=LAYERS)
    axes.heads(1, 6, times=LAYERS)
    axes.sizes(8, 8, times=LAYERS)
    return axes


def cached() -> Axes:
    """Llama with 2 key/value heads that returns keys and values: of the attention only the query heads are free."""
    axes = Axes()
    axes.hidden(28)
    axes.hidden(FEED, times=LAYERS)
    axes.heads(1, 2, times=LAYERS)  # query heads per key/value head
    return axes


def t5_encoder() -> Axes:
    """The stream is returned; the first layer's position table serves all layers."""
    axes = Axes()
    axes.hidden(FEED, times=LAYERS)
    axes.heads(6)  # one axis over the layers
    axes.sizes(8, 8, times=LAYERS)
    return axes


def t5_full() -> Axes:
    """The encoder's result is returned and its embedding is also the decoder's: both streams are fixed."""
    axes = t5_encoder()
    axes.hidden(FEED, times=LAYERS)  # decoder
    axes.heads(6)  # decoder self-attention: its own table
    axes.heads(6)  # cross attention: all layers add one tensor of zeros
    axes.sizes(8, 8, times=2 * LAYERS)
    return axes


def whisper_encoder() -> Axes:
    """The stream, from the second convolution on, is returned."""
    axes = Axes()
    axes.channel(48)  # between the two convolutions
    axes.hidden(FEED, times=LAYERS)
    axes.attention(6, 8, 8, times=LAYERS)
    return axes


def whisper_full() -> Axes:
    """The encoder's result is returned as well."""
    axes = whisper_encoder()
    axes.hidden(48)  # decoder stream, tied to the head
    axes.hidden(52, times=LAYERS)  # decoder feed-forward
    axes.attention(6, 8, 8, times=2 * LAYERS)  # decoder self and cross attention
    return axes


def bart() -> Axes:
    """Encoder result returned, embedding shared by both sides and the head: no stream is free."""
    axes = Axes()
    axes.hidden(56, 52, times=LAYERS)  # encoder and decoder feed-forward
    axes.attention(6, 48 // 6, 48 // 6, times=LAYERS)  # encoder
    axes.attention(4, 48 // 4, 48 // 4, times=2 * LAYERS)  # decoder self and cross attention
    return axes


def mamba() -> Axes:
    """Width 20, twice as wide inside, state of 4, time steps of rank 5."""
    axes = Axes()
    axes.hidden(20)  # stream
    axes.channel(40, times=LAYERS)  # convolved part, scan, gate: the two halves of one projection
    axes.hidden(5, times=LAYERS)  # time step before its projection
    axes.hidden(4, times=LAYERS)  # state: B, C and the decay matrix
    return axes


def fnet() -> Axes:
    """Fourier transforms over the features fix the stream."""
    axes = Axes()
    axes.hidden(48)  # embeddings before their projection
    axes.hidden(48)  # pooler
    axes.hidden(FEED, times=LAYERS)
    return axes


INVENTORY: dict[str, Callable[[], Axes]] = {
    "llama_mha": partial(causal, 42, 6, 1),
    "llama_gqa": partial(causal, 42, 2, 3),
    "llama_gqa_4_2": partial(causal, 28, 2, 2),
    "llama_mqa": partial(causal, 42, 1, 6),
    "llama_eager": partial(causal, 42, 2, 3),
    "llama_no_mask": partial(causal, 42, 2, 3),
    "llama_bias_tied": partial(causal, 42, 2, 3),
    "mistral": partial(causal, 42, 2, 3),
    "qwen2": partial(causal, 48, 2, 3),
    "qwen3": partial(causal, 42, 2, 3),
    "gemma": partial(causal, 42, 2, 3),
    "gemma2": partial(causal, 42, 2, 3),
    "gemma3": gemma3,
    "phi3": partial(causal, 48, 2, 3),
    "mixtral": partial(mixture, 60, FEED),
    "qwen2_moe": partial(mixture, 48, 20, 24),
    "gpt_neox": partial(causal, 48, 6, 1, rotary=2),
    "gpt_neox_full_rotary": partial(causal, 48, 6, 1),
    "phi": partial(causal, 48, 2, 3, rotary=4),
    "stablelm": partial(causal, 48, 2, 3, rotary=2),
    "glm": partial(causal, 42, 2, 3, rotary=4),
    "nemotron": partial(causal, 48, 2, 3, rotary=4),
    "olmo2": partial(causal, 48, 2, 3),
    "cohere": partial(causal, 48, 2, 3),
    "starcoder2": partial(causal, 48, 2, 3),
    "granite": partial(causal, 48, 2, 3),
    "smollm3": smollm3,
    "falcon": partial(causal, 48, 1, 6),
    "falcon_grouped": partial(causal, 48, 2, 3),
    "gpt2": learned,
    "gpt_neo": learned,
    "opt": opt,
    "opt_proj": partial(opt, 20),
    "gpt_bigcode": gpt_bigcode,
    "bloom": partial(alibi, 4 * 48),
    "mpt": partial(alibi, 4 * 48),
    "bert": classifier,
    "distilbert": classifier,
    "roberta": classifier,
    "electra": partial(classifier, 20),
    "albert": partial(classifier, 20, 1),
    "bert_mlm": learned,
    "fnet": fnet,
    "t5_encoder": t5_encoder,
    "t5_full": t5_full,
    "t5_gated": t5_full,
    "whisper_encoder": whisper_encoder,
    "whisper_full": whisper_full,
    "bart": bart,
    "pegasus": bart,
    "mamba": mamba,
    "raises/use_cache": cached,
    "hangs/llama_one_layer": lambda: Axes().hidden(28, FEED).heads(2, 2).sizes(4, 8),
}
