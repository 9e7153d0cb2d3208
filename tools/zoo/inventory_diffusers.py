"""Inventories of the diffusers models, from the configurations in `diffusers_models`."""

from __future__ import annotations

from collections.abc import Callable

from .inventory_parts import Axes


def unet_body(widths: tuple[int, ...], layers: int, *, per_resnet: int = 1, top: bool = True) -> Axes:
    """Streams and inner widths of the residual blocks of a U-Net whose levels all have different widths.

    Args:
        widths: of the levels, top first.
        layers: residual blocks per level on the way down.
        per_resnet: inner widths per block: 2 where a temporal block follows the spatial one.
        top: false for the down half alone.
    """
    axes = Axes()
    for level, width in enumerate(widths):
        last = level == len(widths) - 1
        # down: blocks without a change of width share one stream (level 0 also with the first convolution), the
        # downsampling convolution starts another; both are kept as skips. The middle continues the last stream.
        axes.channel(width, times=1 if last else 2)
        axes.channel(width, times=per_resnet * (layers + (2 if last else 0)))  # inner; two blocks in the middle
        if top:
            # up: every block reads a concat with a skip and so has a projection: a new stream for each; the
            # upsampling convolution (none at level 0) starts another
            axes.channel(width, times=layers + 1 + (level > 0))
            axes.channel(width, times=per_resnet * (layers + 1))  # inner
    return axes


def time_embedding(width: int, frequencies: int) -> Axes:
    """Two linear layers of four times the top width; the second feeds every residual block."""
    return Axes().hidden(4 * width, 4 * width).computed(frequencies)


def unet2d(layers: int = 1) -> Axes:
    """Widths 16, 24, 40; self-attention with heads of 8 at the lower two levels and in the middle."""
    axes = unet_body((16, 24, 40), layers)
    axes.update(time_embedding(16, 16 // 2))
    axes.attention(24 // 8, 8, 8, times=layers + (layers + 1))  # level 1: down and up
    axes.attention(40 // 8, 8, 8, times=layers + 1 + (layers + 1))  # level 2: down, middle, up
    return axes


def transformer(width: int, heads: int, times: int, blocks: int = 1, conv: bool = True) -> Axes:
    """`times` transformers between two projections, each of `blocks` blocks with self and cross attention."""
    axes = Axes()
    if conv:
        axes.channel(width, times=times)  # stream between the projections
    else:
        axes.hidden(width, times=times)
    axes.attention(heads, width // heads, width // heads, times=2 * blocks * times)
    axes.hidden(4 * width, times=blocks * times)  # gated: both halves are one axis
    return axes


def sd15() -> Axes:
    """Widths 16, 24, 32, 40, two heads everywhere; no attention at the lowest level but in the middle."""
    axes = unet_body((16, 24, 32, 40), 1)
    axes.update(time_embedding(16, 16 // 2))
    for width in (16, 24, 32):
        axes.update(transformer(width, 2, times=1 + 2))  # down, two up
    axes.update(transformer(40, 2, times=1))  # middle
    return axes


def sdxl() -> Axes:
    """Widths 16, 24, 40 with 0, 1 and 2 transformer blocks and 3 and 5 heads; linear projections."""
    axes = unet_body((16, 24, 40), 1)
    axes.update(time_embedding(16, 16 // 2))
    axes.hidden(64)  # text and size embedding, first layer; the second is added
    axes.computed(6 // 2)  # frequencies of the six sizes; the text features are input
    axes.update(transformer(24, 3, times=1 + 2, conv=False))  # down, two up
    axes.update(transformer(40, 5, times=1 + 1 + 2, blocks=2, conv=False))  # down, middle, two up
    return axes


def audioldm2() -> Axes:
    """Widths 16 and 24, two heads; three transformers at each attention position."""
    axes = unet_body((16, 24), 1)
    axes.update(time_embedding(16, 16 // 2))
    axes.update(transformer(16, 2, times=3 * (1 + 2)))  # down, two up
    axes.update(transformer(24, 2, times=3))  # middle
    return axes


def spatio_temporal() -> Axes:
    """Widths 64 and 96 with 2 and 4 heads; each residual block and each transformer has a temporal twin."""
    axes = unet_body((64, 96), 1, per_resnet=2)  # the temporal block continues the spatial block's stream
    axes.update(time_embedding(64, 64 // 2))
    axes.hidden(256)  # embedding of the added times, first layer
    axes.computed(6 // 2)  # its frequencies, shared by the three added times
    for width, heads, positions in ((64, 2, 1 + 2), (96, 4, 1)):  # down and up; middle
        axes.hidden(width, times=positions)  # stream between linear projections, frame embedding added
        axes.attention(heads, width // heads, width // heads, times=4 * positions)  # self and cross, space and time
        axes.hidden(4 * width, times=3 * positions)  # gated: spatial, temporal input, temporal
        axes.hidden(4 * width, times=positions)  # embedding of the frame number
        axes.computed(width // 2, times=positions)  # its frequencies
    return axes


def controlnet() -> Axes:
    """Widths 16 and 24, two heads; the zero convolutions' outputs are the program's."""
    axes = unet_body((16, 24), 1, top=False)  # the condition embedding is added to the first stream
    axes.update(time_embedding(16, 16 // 2))
    axes.channel(5, 5, 7)  # condition: first layer, one block of two convolutions
    axes.update(transformer(16, 2, times=1))
    axes.update(transformer(24, 2, times=1))  # middle
    return axes


def vae_decoder() -> Axes:
    """Widths 8 and 12 (entered from below), two blocks per level, attention with one head in the middle."""
    axes = Axes()
    axes.channel(4)  # after the first 1x1 convolution
    axes.channel(12, 12)  # stream of the middle and the lower level; upsampled
    axes.channel(12, times=2 + 2)  # inner widths: middle, lower level
    axes.channel(8)  # stream of the upper level
    axes.channel(8, times=2)  # inner widths
    axes.sizes(12, 12)  # one head is no axis
    return axes


def vae_full() -> Axes:
    """Encoder in front of the decoder, the posterior's mean between them."""
    axes = vae_decoder()
    axes.channel(8, 8)  # stream of the first level, downsampled
    axes.channel(8)  # inner width
    axes.channel(12)  # stream of the second level and the middle
    axes.channel(12, times=1 + 2)  # inner widths: second level, middle
    axes.sizes(12, 12)
    axes.channel(8)  # moments before the 1x1 convolution
    axes.channel(4)  # mean, read by the decoder
    axes.channel(4)  # logarithm of the variance: computed, read by nothing
    return axes


WIDTH, HEADS, SIZE = 24, 3, 8  # of all diffusion transformers below


def dit() -> Axes:
    """Two blocks; each embeds timestep and class on its own, the output layers use the first block's."""
    axes = Axes()
    axes.channel(WIDTH)  # patches, positions, all modulations
    axes.hidden(WIDTH, WIDTH, times=2)  # timestep, first layer; timestep + class
    axes.computed(256 // 2, times=2)  # frequencies
    axes.hidden(4 * WIDTH, times=2)  # feed-forward
    axes.attention(HEADS, SIZE, SIZE, times=2)
    return axes


def pixart() -> Axes:
    """The embedded timestep is added to the output modulation table and so belongs to the stream."""
    axes = Axes()
    axes.channel(WIDTH)  # stream, modulations, embedded timestep
    axes.hidden(WIDTH)  # timestep, first layer
    axes.computed(256 // 2)  # frequencies
    axes.hidden(WIDTH, WIDTH)  # captions: first layer, result read by all cross attentions
    axes.hidden(4 * WIDTH, times=2)  # feed-forward
    axes.attention(HEADS, SIZE, SIZE, times=2 * 2)  # self and cross
    return axes


def joint_embedding() -> Axes:
    """Timestep and pooled text through two layers each, added."""
    axes = Axes()
    axes.hidden(WIDTH, WIDTH)  # first layers
    axes.hidden(WIDTH)  # sum, read by all modulations
    axes.computed(256 // 2)  # frequencies
    return axes


def sd3(dual: int = 0) -> Axes:
    """Two joint blocks; the last one has no feed-forward for the text. `dual`: blocks with a second attention."""
    axes = joint_embedding()
    axes.channel(WIDTH)  # image stream
    axes.hidden(WIDTH)  # text stream: meets the image only along the positions
    axes.hidden(4 * WIDTH, times=2 + 1)  # feed-forward: image, text
    axes.attention(HEADS, SIZE, SIZE, times=2 + dual)  # image and text tokens share heads and sizes (and norms)
    return axes


def flux() -> Axes:
    """Two blocks with two streams and two with one; the single blocks concatenate text and image positions."""
    axes = joint_embedding()
    axes.hidden(WIDTH)  # image and text stream
    axes.hidden(4 * WIDTH, times=2 * 2)  # feed-forward of the two-stream blocks, image and text
    axes.hidden(4 * WIDTH, times=2)  # of the single blocks, concatenated with the attention
    axes.heads(HEADS, times=4)
    axes.sizes(0, SIZE, times=4)
    # rotary pairs of three position axes, (2, 2, 4) / 2, side by side in one table for all blocks: three axes of
    # 1, 1 and 2. The table is computed from constants (see `Axes.computed`).
    axes.sizes(1, 0).sizes(1, 0).sizes(2, 0)
    return axes


INVENTORY: dict[str, Callable[[], Axes]] = {
    "unet2d": unet2d,
    "unet2d_scalar_timestep": unet2d,
    "unet2d_scale_shift": lambda: unet2d(2),
    "unet_sd15": sd15,
    "unet_sdxl": sdxl,
    "unet_audioldm2": audioldm2,
    "unet_spatio_temporal": spatio_temporal,
    "controlnet": controlnet,
    "vae_decoder": vae_decoder,
    "vae_full": vae_full,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "sd35": lambda: sd3(1),
    "flux": flux,
}
