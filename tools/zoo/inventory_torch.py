"""Inventories of the models written with torch alone, from the sizes in their constructors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .inventory_parts import Axes


def recurrent(layers: int, both: bool = False) -> Axes:
    """Linear (6), recurrent layers of 7, linear."""
    axes = Axes()
    axes.hidden(6)  # output of the first linear, input of the recurrence
    axes.hidden(7, times=layers * (1 + both))  # hidden state (and cell): per layer and direction
    return axes


def recurrent_projected() -> Axes:
    """An LSTM whose hidden state is projected: the cell keeps its own size."""
    axes = Axes()
    axes.hidden(6)  # output of the first linear
    axes.hidden(7)  # cell state and gates, input of the projection
    axes.hidden(4)  # projected hidden state, input of the last linear
    return axes


def attend(keys: int = 0) -> Axes:
    """Residual nn.MultiheadAttention of width 12, 3 heads; with `keys`, other key and value features."""
    axes = Axes()
    axes.hidden(12)  # h and h + attention: one stream with norm and last linear
    if keys:
        axes.hidden(keys, keys + 1)  # features that keys and values are projected from
    axes.attention(3, 4, 4)  # 12 / 3
    return axes


def attend_bare() -> Axes:
    """The module alone: features are input and output; returns weights averaged over the heads."""
    return Axes().attention(3, 4, 4)  # the average over heads is a statistic over that axis


def encoder() -> Axes:
    """nn.TransformerEncoder of two layers."""
    axes = Axes()
    axes.hidden(12)  # stream from the first to the last linear
    axes.hidden(20, times=2)  # feed-forward
    axes.attention(3, 4, 4, times=2)
    return axes


def seq2seq() -> Axes:
    """nn.Transformer, one layer on each side."""
    axes = Axes()
    axes.hidden(12, 12)  # encoder stream (read by the cross attention), decoder stream
    axes.hidden(20, times=2)  # feed-forward
    axes.attention(3, 4, 4, times=3)  # encoder, decoder, cross
    return axes


def dgcnn() -> Axes:
    """Each level is read by distances, by the next edge convolution (twice) and by the concat of levels."""
    axes = Axes()
    axes.channel(6, 9)  # the two edge convolutions
    axes.channel(11)  # 15 = 6 + 9 mixed to 11; pooled by maximum and mean: 22
    axes.hidden(8)  # classifier with batch norm
    return axes


def gat() -> Axes:
    """3 heads of 5 features; no query-key product, so both are plain factors of the width 15."""
    axes = Axes()
    axes.hidden(3)  # heads
    axes.hidden(5)  # features per head: scores by a vector, and the messages
    return axes  # second layer: one head, its 6 features are the output


def gcn() -> Axes:
    """Residual of width 7."""
    return Axes().hidden(7)


def pointnet() -> Axes:
    """A learned 3 by 3 transform, then shared layers."""
    axes = Axes()
    axes.channel(7)  # transform network
    axes.channel(3)  # columns of the transform = coordinates that layer a reads
    axes.channel(6, 10)  # layers a and b
    return axes  # rows of the transform meet the input coordinates


def resnet_basic() -> Axes:
    """Stem 6; inner 7; then inner 9 to 10 by projection; inner 11."""
    return Axes().channel(6, 7, 9, 10, 11)  # streams 6 and 10 are each one axis over their blocks


def resnet_bottleneck() -> Axes:
    """Stem 6; two blocks 5-5-12, one block 7-7-20."""
    axes = Axes()
    axes.channel(6, 12, 20)  # streams
    axes.channel(5, times=2 * 2)  # two inner widths in two blocks
    axes.channel(7, times=2)
    return axes


def resnext() -> Axes:
    """Two blocks with 12 = 4 groups of 3 on both sides of the grouped convolution."""
    axes = Axes()
    axes.channel(6, 14)  # streams
    axes.channel(4, times=2)  # groups: shared by the input and output of the convolution
    axes.channel(3, 3, times=2)  # widths within a group, in and out
    return axes


def regnet_y() -> Axes:
    """Two blocks with 10 = 2 groups of 5 and a squeeze of 3."""
    axes = Axes()
    axes.channel(6, 10)  # streams
    axes.channel(2, times=2)  # groups
    axes.channel(5, 5, times=2)  # within a group, in and out
    axes.channel(3, times=2)  # squeeze
    return axes


def res2(part: int) -> Axes:
    """Four parts: the first; the second with the first's result; the third with the second's; result; fourth."""
    return Axes().channel(part, times=5)


def res2net() -> Axes:
    """Two blocks on a stream of 9."""
    return Axes(Axes().channel(9) + res2(5) + res2(4))


def densenet() -> Axes:
    """Every layer output is an axis of its own: all later layers read it in their concats."""
    axes = Axes()
    axes.channel(8, 9)  # stem, transition
    axes.channel(12, 5, times=4)  # bottleneck and growth of 4 layers
    return axes


def mobilenet_v2() -> Axes:
    """Expansion and depthwise output are one axis."""
    axes = Axes()
    axes.channel(6, 5, 7)  # stem (also the first, unexpanded block), streams
    axes.channel(12, 15)  # expansions
    axes.channel(20)  # last convolution
    return axes


def mobilenet_v3() -> Axes:
    """Stem 6; expansions 11 and 15 with squeezes 4 and 5; stream 7; last 20."""
    return Axes().channel(6, 11, 4, 7, 15, 5, 20)


def efficientnet() -> Axes:
    """Stem 6 with squeeze 3; streams 5 and 7; expansions 12 and 15 with squeezes 4."""
    return Axes().channel(6, 3, 5, 12, 4, 7, 15, 4)


def c2f(half: int, blocks: int = 2) -> Axes:
    """First half; second half with all bottleneck outputs (they add up); one inner width per bottleneck."""
    return Axes().channel(half, times=1 + 1 + blocks)


def c2f_model() -> Axes:
    """Stem 6, C2f with halves of 5 to 9, pooling pyramid of 4 to 11."""
    return Axes(Axes().channel(6, 9, 4, 11) + c2f(5))  # the pyramid concatenates the same 4 channels four times


def inception() -> Axes:
    """Stem 8; branches 3, 6-5, 7-4, 2; last 10."""
    return Axes().channel(8, 3, 6, 5, 7, 4, 2, 10)


def vgg() -> Axes:
    """Convolutions 6, 9, 10; 10 channels times 16 positions enter the linear layer of 11."""
    return Axes().channel(6, 9, 10).hidden(11)


def plain_unet() -> Axes:
    """Skip concats hold 16 + 12 and 12 + 8 channels."""
    axes = Axes()
    axes.channel(8, 8, 8)  # stem with its skip, first downsampling, last block
    axes.channel(12, 12, 12, 12)  # second level, its downsampling, up block, upsampling
    axes.channel(20, 16)  # bottom, its upsampling
    return axes


def uvit() -> Axes:
    """Blocks (heads, size, hidden): (3, 8, 28), (3, 8, 24), (2, 6, 32)."""
    axes = Axes()
    axes.channel(20)  # patches, time token, positions, down and middle blocks
    axes.hidden(20)  # after the skip layer: up block, norm, prediction
    axes.hidden(28, 24, 32)  # feed-forward
    axes.hidden(14)  # time embedding
    axes.computed(6)  # its frequencies
    axes.channel(3)  # image channels between the prediction and the last layer
    axes.attention(3, 8, 8, times=2).attention(2, 6, 6)
    return axes


def plain_vit() -> Axes:
    """Two blocks of 3 heads of 8 on a stream of 20."""
    return Axes().channel(20).hidden(28, times=2).attention(3, 8, 8, times=2)


def nano_gpt() -> Axes:
    """The tied embedding and the head's input are the stream."""
    return Axes().hidden(20).hidden(28, times=2).attention(3, 8, 8, times=2)


def mixer() -> Axes:
    """Stream, hidden positions, hidden features; the positions themselves come from the picture."""
    return Axes().channel(20).hidden(9, 28)


INVENTORY: dict[str, Callable[[], Axes]] = {
    "lstm_1": partial(recurrent, 1),
    "lstm_2": partial(recurrent, 2),
    "lstm_final": partial(recurrent, 2),
    "lstm_bi_1": partial(recurrent, 1, True),
    "lstm_bi_2": partial(recurrent, 2, True),
    "lstm_proj": recurrent_projected,
    "lstm_bare": Axes,  # all states of both layers are outputs
    "gru_1": partial(recurrent, 1),
    "gru_2": partial(recurrent, 2),
    "gru_bi_2": partial(recurrent, 2, True),
    "rnn_2": partial(recurrent, 2),
    "mha_bare": attend_bare,
    "mha": attend,
    "mha_weights": attend,
    "mha_mask": attend,
    "mha_kdim": partial(attend, 9),
    "transformer_encoder": encoder,
    "transformer_encoder_pre": encoder,
    "transformer_full": seq2seq,
    "dgcnn": dgcnn,
    "gat": gat,
    "gcn": gcn,
    "pointnet": pointnet,
    "resnet_basic": resnet_basic,
    "resnet_bottleneck": resnet_bottleneck,
    "resnext": resnext,
    "regnet_y": regnet_y,
    "res2net": res2net,
    "densenet": densenet,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "c2f": c2f_model,
    "inception": inception,
    "vgg": vgg,
    "unet_plain": plain_unet,
    "unet_group": plain_unet,
    "pyramid": lambda: Axes().channel(6, 9, 11, 7),  # levels; the pyramid adds them at one width
    "super_resolution": lambda: Axes().channel(6, 9, 5),  # residual, inner, 20 = 5 channels of 2 by 2 pixels
    "wavenet": lambda: Axes().channel(6, 5, 8, 8),  # residual and skip streams; gates: two halves, one axis
    "video3d": lambda: Axes().channel(6, 8, 9),
    "plain_vit": plain_vit,
    "nano_gpt": nano_gpt,
    "uvit": uvit,
    "mixer": mixer,
}
