"""Inventories of the odd cases, from the sizes written in them; several cases per line where they agree.

Left out: the channel shuffles. A permutation is one axis where any single channel can go; written as a transpose of
two factors it is two axes unless the program is rewritten, and both readings are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .inventory_parts import Axes
from .inventory_torch import c2f, res2

Make = Callable[[], Axes]


def channels(*sizes: int) -> Make:
    """Axes that convolutions carry."""
    return lambda: Axes().channel(*sizes)


def hidden(*sizes: int) -> Make:
    """Axes of linear layers."""
    return lambda: Axes().hidden(*sizes)


def both(conv: tuple[int, ...], linear: tuple[int, ...]) -> Make:
    """Axes of both kinds."""
    return lambda: Axes().channel(*conv).hidden(*linear)


def attention(*streams: int, heads: int = 3, value: int = 4, rep: int = 1) -> Make:
    """An attention with query/key size 4 and the given streams."""
    return lambda: Axes().hidden(*streams).heads(heads, rep).sizes(4, value)


def _works() -> Iterator[tuple[str, Make]]:
    """The cases under works/."""
    for name in (
        "conv_bn_relu_conv",
        "residual_add",
        "prelu",
        "instance_norm",
        "batch_norm_plain",
        "depthwise",
        "depthwise_transposed",
        "reused",
        "straight_through",
        "inplace_slice",
    ):
        yield name, channels(8)
    for name in ("concat_dim1", "concat_dim_minus3"):
        yield name, channels(8, 5)  # the parts of a concat are separate
    for name in ("concat_twice", "concat_with_relu"):
        yield name, channels(7)  # both parts are the same channels
    for name in (
        "chunk_product",
        "glu_gate",
        "spatial_concat",
        "batch_concat",
        "chunk_width",
        "chunk_height",
        "slice_spatial",
        "patch_embedding",
        "layer_scale_map",
        "linear_view_conv",
    ):
        yield name, channels(6)
    for name in ("1d", "2d", "3d", "1d_bn", "2d_bn", "3d_bn"):
        yield f"flatten_conv{name}", channels(6)  # positions are no axis
    yield "swiglu_chunk", hidden(7)
    for name in (
        "token_concat",
        "slice_tokens",
        "position_embedding",
        "layer_scale_vector",
        "class_token",
        "class_token_vector",
    ):
        yield name, hidden(6)
    for name in ("layer_norm", "rms_norm_module", "recurrent_use"):
        yield name, hidden(8)
    yield "crop", channels(6, 5)
    yield "focus", channels(5)  # four slices of the positions, the same channels
    yield "learned_queries", lambda: Axes().hidden(6).sizes(8, 9)  # one head: query/key size 8, value size 9
    yield "squeeze_conv", channels(8, 5)
    yield "squeeze_linear", both((8,), (5,))
    yield "conv_transpose", channels(8, 6)
    yield "reused_branches", channels(8, 5)  # both branches enter one weight: one axis before, one after
    yield "checkpoint", channels(8, 7)
    yield "attention_separate", attention(10, value=5)
    for name in ("unbind", "chunk", "split"):
        yield f"attention_{name}", attention(10)
    yield "attention_grouped", attention(10, heads=2, rep=3)
    yield "attention_module", attention(12)  # residual: one stream


def _wrong() -> Iterator[tuple[str, Make]]:
    """The cases under wrong/."""
    yield "split_cat", channels(8, 8, 6, 6)  # both parts of the split, both results
    for name in ("split_sum", "split_sum_reversed"):
        yield name, channels(8, 8, 6)  # the results are added
    yield "split_uneven_cat", channels(10, 6, 6, 6)
    yield "split_uneven_sum", channels(10, 6, 6)
    yield "gate_layer_on_half", channels(6, 6)  # u with the gate's output; v
    yield "feature_chunk", hidden(6, 6)
    yield "split_first_unused", channels(10, 6)  # the unused part can go as well
    for name in ("flip", "roll", "stack_flatten"):
        yield name, channels(7)  # a stack aligns its parts: a and b shrink together
    yield "flatten_channels_last", channels(6)
    yield "concat_flattened_equal", channels(6, 6)
    yield "concat_flattened_unequal", channels(5, 7)
    yield "concat_vector_flattened", both((5,), (9,))
    yield "slice_negative", channels(4, 5)  # 4 read, 5 read by nothing
    yield "slice_bounded", channels(2, 4, 3)  # before, inside and after the slice
    yield "grouped_conv", channels(2, 4, 3)  # groups; input and output width within a group
    yield "group_norm", channels(8)
    yield "group_norm_concat", channels(64, 32)
    yield "group_norm_concat_even", channels(24, 12)
    yield "attention_module", attention(12, 12)  # no residual: before and after
    yield "attention_module_8_2", attention(8, 8, heads=2)
    for name in ("view_heads", "view_size", "per_head_qkv", "implicit_scale"):
        yield f"attention_{name}", attention()
    for name in ("channel_conv", "softmax_channels", "softmax_features"):
        yield name, Axes  # no exact equivalent of a narrower layer
    yield "shared_weight", channels(6, 5)  # the shared tensor couples both branches, in and out
    yield "shared_parameter", hidden(6)
    for name in ("spatial_gate", "spatial_attention", "channel_sum"):
        yield name, channels(8)  # mean and maximum are statistics over the channels


def _raises() -> Iterator[tuple[str, Make]]:
    """The cases under raises/."""
    yield "c2f", lambda: Axes(Axes().channel(6, 9) + c2f(5))
    yield "res2net", lambda: Axes(Axes().channel(6) + res2(5))
    for name in ("split", "slice"):
        yield f"partial_conv_{name}", channels(4, 4, 8)  # before and after the partial convolution; passed on
    yield "cat_half_conv", channels(6, 6, 5)
    yield "gate_half_conv", channels(6, 6)
    yield "interleaved_chunks", channels(6, 6, 4, 4)
    yield "cat_last_unequal", hidden(6, 9)
    for name in ("token_chunk", "token_chunk_negative", "flatten_tokens"):
        yield name, hidden(6)
    for name in ("spatial_chunk_negative", "linear_view_literal", "unflatten_literal"):
        yield name, channels(6)
    yield "feature_chunk_positive", hidden(6, 6)
    for name in ("fused_qkv_chunk", "fused_qkv_index"):
        yield name, attention()
    for name in ("glu", "swiglu_slices"):
        yield name, hidden(7)
    for name in ("glu_channels", "permutation_index", "index_select"):
        yield name, channels(7)
    for name in ("strided_slice", "strided_slices_both"):
        yield name, channels(5, 5)  # even and odd channels
    for name in ("pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "unfold", "layer_norm_map"):
        yield name, channels(5)  # the other factor is positions or copies
    yield "outer_product", hidden(4, 6)
    yield "bilinear", hidden(4, 6, 7)
    yield "flatten_beside_sequence", both((5,), (6,))
    yield "unflatten_features", hidden(4)  # the factor 3 is reduced by a maximum: no exact equivalent
    yield "mixer", hidden(6, 9, 11)  # features, hidden positions, hidden features
    yield "position_then_concat", hidden(6, 8)
    for name in ("position_then_gate", "matmul_parameter", "einsum_parameter", "foreign_linear"):
        yield name, hidden(6, 7)
    yield "einsum_heads", hidden(6, 3, 4)  # no query-key product: plain factors
    for name in (
        "foreign_conv",
        "weight_norm_old",
        "weight_norm",
        "frozen_stem",
        "detach",
        "no_grad",
        "spectral_norm_old",
        "spectral_norm",
    ):  # the spectral norm is a statistic over the whole weight
        yield name, channels(6, 7)
    for name in (
        "learned_map",
        "parameter_literal_shape",
        "buffer_literal_shape",
        "buffer_per_channel",
        "instance_norm_tracked",
    ):
        yield name, channels(8)
    yield "rms_norm", hidden(8)
    for name in ("standardised_weights", "checkpoint_reentrant"):
        yield name, channels(8, 7)  # standardisation is a statistic over the input channels
    for name in ("depthwise_multiplier", "depthwise_shrinking"):
        yield name, channels(6, 2)  # groups; outputs, or inputs, per group
    yield "transposed_groups", channels(2, 4, 3)
    yield "group_norm_then_groups", channels(6, 4, 2)
    yield "attention_kdim", attention(12, 9, 10, 12)  # query, key and value features; result
    for name in ("lstm", "gru", "rnn"):
        yield name, hidden(6, 7)
        yield f"{name}_bidirectional", hidden(6, 7, 7)  # one hidden state per direction


INVENTORY: dict[str, Make] = {
    f"{prefix}/{name}": make
    for prefix, cases in (("works", _works()), ("wrong", _wrong()), ("raises", _raises()))
    for name, make in cases
}
