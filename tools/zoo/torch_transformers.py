"""Hand-written transformers, without any model library: the layouts that research code uses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .entry import Entry, case, image, tokens


class FusedAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values, as in timm and nanoGPT."""

    def __init__(self, width: int, count: int, size: int, causal: bool = False) -> None:
        """`count` heads of `size`; the product need not be the width."""
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * count * size), nn.Linear(count * size, width)
        self.count, self.size, self.causal = count, size, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, positions, width) to the same."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.count, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, n, self.count * self.size))


class Block(nn.Module):
    """Normalise, attend, normalise, feed forward."""

    def __init__(self, width: int, count: int, size: int, hidden: int, causal: bool = False) -> None:
        """Widths."""
        super().__init__()
        self.n1, self.attention = nn.LayerNorm(width), FusedAttention(width, count, size, causal)
        self.n2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two residual additions."""
        x = x + self.attention(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class PlainViT(nn.Module):
    """Vision transformer: patches, class token, learned positions."""

    def __init__(self) -> None:
        """Width 20, 3 heads of 8, feed-forward 28."""
        super().__init__()
        self.patch = nn.Conv2d(3, 20, 4, 4)
        self.token, self.pos = nn.Parameter(torch.zeros(1, 1, 20)), nn.Parameter(torch.zeros(1, 17, 20))
        self.blocks = nn.ModuleList([Block(20, 3, 8, 28) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, 16, 16) to (batch, 5)."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class NanoGPT(nn.Module):
    """Causal language model with tied embeddings."""

    def __init__(self) -> None:
        """Width 20, 3 heads of 8, feed-forward 28, vocabulary 31."""
        super().__init__()
        self.wte, self.wpe = nn.Embedding(31, 20), nn.Embedding(16, 20)
        self.blocks = nn.ModuleList([Block(20, 3, 8, 28, causal=True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 31, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, length) to (batch, length, 31)."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class UViT(nn.Module):
    """U-ViT: time and patches as tokens, long skips by concat and a linear layer, a last convolution."""

    def __init__(self) -> None:
        """Width 20; one block down, one in the middle, one up."""
        super().__init__()
        self.patch, self.pos = nn.Conv2d(3, 20, 2, 2), nn.Parameter(torch.zeros(1, 17, 20))
        self.t1, self.t2 = nn.Linear(12, 14), nn.Linear(14, 20)
        self.down, self.mid, self.up = Block(20, 3, 8, 28), Block(20, 3, 8, 24), Block(20, 2, 6, 32)
        self.skip = nn.Linear(40, 20)
        self.norm, self.predict, self.final = nn.LayerNorm(20), nn.Linear(20, 12), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(batch, 3, 8, 8) and (batch,) to (batch, 3, 8, 8)."""
        angle = time[:, None] * torch.exp(-math.log(1000) * torch.arange(6) / 6)
        t = self.t2(F.silu(self.t1(torch.cat([angle.cos(), angle.sin()], -1))))
        h = torch.cat([t[:, None], self.patch(x).flatten(2).transpose(1, 2)], 1) + self.pos
        h = self.down(h)
        y = self.up(self.skip(torch.cat([self.mid(h), h], -1)))
        y = self.predict(self.norm(y))[:, 1:]
        y = y.reshape(x.shape[0], 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], 3, 8, 8)
        return self.final(y)


class Mixer(nn.Module):
    """MLP-Mixer for images."""

    def __init__(self) -> None:
        """Width 20, 16 positions, 9 hidden positions, 28 hidden features."""
        super().__init__()
        self.patch = nn.Conv2d(3, 20, 4, 4)
        self.n1, self.t1, self.t2 = nn.LayerNorm(20), nn.Linear(16, 9), nn.Linear(9, 16)
        self.n2, self.f1, self.f2 = nn.LayerNorm(20), nn.Linear(20, 28), nn.Linear(28, 20)
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, 16, 16) to (batch, 5)."""
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = h + self.t2(F.gelu(self.t1(self.n1(h).transpose(1, 2)))).transpose(1, 2)
        h = h + self.f2(F.gelu(self.f1(self.n2(h))))
        return self.head(self.norm(h).mean(1))


class LinearAttention(nn.Module):
    """Image restoration with channel attention: queries and keys over channels, as in Restormer."""

    def __init__(self) -> None:
        """Width 12, 3 heads of 5 channels."""
        super().__init__()
        self.inp, self.qkv = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 45, 1)
        self.local = nn.Conv2d(45, 45, 3, padding=1, groups=45)
        self.scale, self.out, self.last = (
            nn.Parameter(torch.ones(3, 1, 1)),
            nn.Conv2d(15, 12, 1),
            nn.Conv2d(12, 3, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, h, w) to the same; the softmax runs over the channels of a head."""
        h = self.inp(x)
        b, _, rows, cols = h.shape
        q, k, v = (p.reshape(b, 3, 5, rows * cols) for p in self.local(self.qkv(h)).chunk(3, 1))
        score = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale
        return self.last(h + self.out((score.softmax(-1) @ v).reshape(b, 15, rows, cols)))


ENTRIES: list[Entry] = [
    Entry("plain_vit", "torch", lambda: case(PlainViT(), lambda b: image(b, 3, 16, 16)), note="fused qkv"),
    Entry("nano_gpt", "torch", lambda: case(NanoGPT(), lambda b: tokens(b, 9, 31)), note="fused qkv, tied"),
    Entry(
        "uvit",
        "torch",
        lambda: case(UViT(), lambda b: (image(b, 3, 8, 8), torch.arange(b) * 30.0 + 5)),
        note="long skips",
    ),
    Entry("mixer", "torch", lambda: case(Mixer(), lambda b: image(b, 3, 16, 16)), note="positions mixed by layers"),
    Entry(
        "channel_attention",
        "torch",
        lambda: case(LinearAttention(), lambda b: image(b, 3, 8, 8)),
        note="softmax over channels",
    ),
]
