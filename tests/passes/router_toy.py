"""A small random transformer with a gate from the time, its sampling run, and a short training on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphwright as gw

STEPS, TOKENS, CHANNELS, WIDTH, BLOCKS = 10, 16, 4, 32, 4
TIMES = list(range(900, -1, -100))
ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)


class Block(nn.Module):
    """Attention and feed-forward with scale, shift and gate from the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a, b, c, d, e, f = self.modulation(nn.functional.silu(time))[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + a) + b).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + c * self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + d * self.down(nn.functional.gelu(self.up(self.norm2(x) * (1 + e) + f)))


class Transformer(nn.Module):
    """Four blocks; branches add from everything to a thousandth of it, as no two of a trained network matter alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.time = (
            nn.Linear(CHANNELS, WIDTH),
            nn.Linear(WIDTH, CHANNELS),
            nn.Linear(WIDTH, WIDTH),
        )
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.7 / parameter.shape[1] ** 0.5, generator=generator)
            else:
                nn.init.normal_(parameter, std=0.5 if "modulation" in name else 0.1, generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                parameter.data *= 10 ** (-3 * torch.rand((), generator=generator))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        frequencies = 0.05 * torch.exp(torch.arange(WIDTH // 2) * (-math.log(1000) / (WIDTH // 2)))
        angles = timestep[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        h = self.first(x)
        for block in self.blocks:
            h = block(h, time)
        return self.last(h)


def sample(denoise: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
    """Ten steps of DDIM."""
    x = torch.randn(8, TOKENS, CHANNELS, generator=generator)
    for i, time in enumerate(TIMES):
        noise = denoise(x, torch.full((8,), float(time)))
        a, b = ALPHAS[time], ALPHAS[TIMES[i + 1]] if i + 1 < STEPS else torch.tensor(1.0)
        x = (x - (1 - a).sqrt() * noise) / a.sqrt() * b.sqrt() + (1 - b).sqrt() * noise
    return x


def train(program: gw.Program, run: Any = sample, **options: Any) -> gw.LayerRouter:
    return gw.train_layer_router(program, run, **{"evaluations": STEPS, "lr": 0.25, "rounds": 3, **options})


def taken(router: gw.LayerRouter, threshold: float) -> int:
    return sum(router.removed(threshold).values())


def captured() -> gw.Program:
    return gw.capture(Transformer().eval(), (torch.randn(8, TOKENS, CHANNELS), torch.full((8,), 5.0)))
