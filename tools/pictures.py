"""Pictures without an imaging library: grids of grey images as PNG."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import torch
from torch import Tensor


def image_grid(images: Tensor, columns: int | None = None, scale: int = 8) -> bytes:
    """Draw grey pictures as one PNG, in rows, without an imaging library.

    Args:
        images: ``[n, 1, h, w]`` in [-1, 1] (clamped); -1 is black.
        columns: Pictures in a row, by default the root of n rounded up.
        scale: Side of a drawn pixel.

    Returns:
        The bytes of an 8-bit grey PNG file; pictures are parted by a grey line of ``scale`` / 4 pixels.

    Raises:
        ValueError: The shape is another one, or columns or scale is not positive.
    """
    if images.ndim != 4 or images.shape[1] != 1 or not len(images):
        raise ValueError(f"images must be [n, 1, h, w] with n >= 1, got {list(images.shape)}")
    across = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if across < 1 or scale < 1:
        raise ValueError(f"columns {across} and scale {scale} must be positive")
    down, gap = math.ceil(len(images) / across), max(1, scale // 4)
    grey = images.detach().to("cpu", torch.float32).clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    grey = grey[:, 0].to(torch.uint8).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    high, wide = grey.shape[1] + gap, grey.shape[2] + gap
    canvas = torch.full((down * high + gap, across * wide + gap), 96, dtype=torch.uint8)
    for i, picture in enumerate(grey):
        top, left = gap + i // across * high, gap + i % across * wide
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    # 8 bits of grey; then the only compression and filter methods there are, and no interlacing.
    header = struct.pack(">IIBBBBB", canvas.shape[1], canvas.shape[0], 8, 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in canvas)  # each line starts with filter 0, none
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def data_uri(png: bytes) -> str:
    """Return a PNG as a ``data:`` address, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
