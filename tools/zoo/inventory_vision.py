"""Inventories of the transformers vision models, from the configurations in `transformers_vision`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .inventory_parts import Axes


def vit(feed: int = 56) -> Axes:
    """Patch convolution, two layers of 6 heads on a stream of 48; tokens, positions and layer scales join it."""
    return Axes().channel(48).hidden(feed, times=2).attention(6, 8, 8, times=2)


def yolos() -> Axes:
    """The stream is returned; two prediction heads of three layers."""
    axes = Axes().hidden(56, times=2).attention(6, 8, 8, times=2)
    return axes.hidden(48, 48, times=2)  # classes and boxes, two inner widths each


def swin(bias_network: int = 0) -> Axes:
    """Two stages of two blocks, widths 20 and 40, feed-forward four times as wide."""
    axes = Axes()
    axes.channel(20)  # first stage; the merging reads it four times
    axes.hidden(2 * 20)  # second stage
    axes.hidden(4 * 20, 4 * 40, times=2)  # feed-forward
    axes.attention(2, 20 // 2, 20 // 2, times=2)  # each block has a position table of its own
    axes.attention(5, 40 // 5, 40 // 5, times=2)
    if bias_network:
        axes.hidden(bias_network, times=4)  # hidden layer of the position bias network, per block
    return axes


def convnext() -> Axes:
    """Stages of 10 (two blocks) and 14 (one); the depthwise convolution belongs to the stream."""
    return Axes().channel(10, 14).hidden(4 * 10, times=2).hidden(4 * 14)


def resnet_basic() -> Axes:
    """Embedding 6; stages 16 and 20 of two blocks with one inner width each."""
    return Axes().channel(6).channel(16, 20, times=1 + 2)


def resnet_bottleneck() -> Axes:
    """The same stages; two inner widths of a quarter."""
    return Axes().channel(6, 16, 20).channel(16 // 4, 20 // 4, times=2 * 2)


def regnet() -> Axes:
    """Groups of 4 in stages of 8 and 12; squeeze to a quarter of the block's input."""
    axes = Axes()
    axes.channel(6, 8, 12)  # embedding, streams
    axes.channel(8 // 4, 12 // 4, times=2)  # groups, per block
    axes.channel(4, 4, times=2 * 2)  # within a group: in and out, four blocks
    axes.channel(round(6 / 4), round(8 / 4), round(8 / 4), round(12 / 4))  # squeeze: 2, 2, 2, 3
    return axes


def pvt() -> Axes:
    """Stages of 12 (one block) and 20 (two); keys and values of the first stage come from a convolution."""
    axes = Axes()
    axes.channel(12, 20)  # streams
    axes.channel(12)  # reduced sequence
    axes.hidden(2 * 12).hidden(2 * 20, times=2)  # feed-forward
    axes.attention(2, 6, 6).attention(5, 4, 4, times=2)
    return axes


def poolformer() -> Axes:
    """Stages of 10 (one block) and 14 (two), feed-forward of 1x1 convolutions."""
    return Axes().channel(10, 14).channel(2 * 10).channel(2 * 14, times=2)


def segformer() -> Axes:
    """Stages of 12 (one block) and 20 (two); a depthwise convolution inside the feed-forward."""
    axes = Axes()
    axes.channel(12, 20)  # streams
    axes.channel(12)  # reduced sequence of the first stage
    axes.channel(2 * 12).channel(3 * 20, times=2)  # feed-forward
    axes.attention(2, 6, 6).attention(4, 5, 5, times=2)
    axes.channel(18, 18)  # both levels projected, concatenated
    axes.channel(18)  # fused
    return axes


def sam_encoder(neck: bool = True) -> Axes:
    """Two layers on a stream of 24; the relative position tables multiply the queries of their layer."""
    axes = Axes()
    axes.channel(24)  # patches, positions, stream
    axes.hidden(28, times=2)  # feed-forward
    axes.attention(3, 8, 8, times=2)
    if neck:
        axes.channel(20)  # between the neck's convolutions; its output is returned
    return axes


def sam() -> Axes:
    """Image encoder, point prompts, two-way transformer of two layers, mask decoder."""
    axes = sam_encoder()
    # Image embedding, prompts, tokens and both streams of the decoder have width 20; positions of points and pixels
    # are sine and cosine of 10 shared random projections, added to both streams: one axis of 10 in two halves.
    axes.channel(20 // 2)
    axes.attention(2, 20 // 2, 20 // 2, times=2)  # self-attention of the tokens
    axes.attention(2, 10 // 2, 10 // 2, times=2 * 2 + 1)  # both directions per layer, final; half the width inside
    axes.hidden(26, times=2)  # feed-forward
    axes.channel(20 // 4)  # first upscaling
    axes.channel(20 // 8)  # second, contracted with the four networks' outputs
    axes.hidden(20, 20, times=4)  # two inner widths of each of these networks
    axes.hidden(22, 22)  # quality head
    return axes  # the mask prompt's convolutions are not called


def clip() -> Axes:
    """Both towers return their streams, and the projected features are outputs."""
    axes = Axes()
    axes.hidden(28, times=2).attention(3, 8, 8, times=2)  # text
    axes.hidden(56, times=2).attention(6, 8, 8, times=2)  # vision
    return axes


INVENTORY: dict[str, Callable[[], Axes]] = {
    "vit": vit,
    "vit_interpolated": vit,
    "deit": vit,
    "audio_spectrogram": vit,
    "beit": vit,  # a position table per layer: heads stay apart
    "dinov2": partial(vit, 2 * 48),
    "dinov2_swiglu": partial(vit, 64),  # 2/3 of 96, rounded up to a multiple of 8
    "yolos": yolos,
    "swin": swin,
    "swinv2": partial(swin, 512),
    "convnext": convnext,
    "convnextv2": convnext,
    "hf_resnet_basic": resnet_basic,
    "hf_resnet_bottleneck": resnet_bottleneck,
    "hf_regnet": regnet,
    "pvt": pvt,
    "poolformer": poolformer,
    "segformer": segformer,
    "sam_encoder": sam_encoder,
    "sam_encoder_no_relative": sam_encoder,
    "sam": sam,
    "clip": clip,
    "hangs/sam_encoder": sam_encoder,
    "hangs/sam_encoder_no_relative": sam_encoder,
}
