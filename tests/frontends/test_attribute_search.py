"""Write-back finds sizes and the scale of the scores, also where only both together come out right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.frontends.write_back import write_back
from graphwright.graph.depgraph import depgraph
from graphwright.graph.program import Program
from graphwright.graph.resize import RemovalRecord, resize

# Relative to the largest output. Both sides run the same float32 kernels; only folded scales reorder roundings.
CLOSE = 1e-5

HEADS, WIDTHS = ("head",), ("head dim", "value dim")


class Fused(nn.Module):
    """One projection for queries, keys and values, a size under a name that says little, a scale from that size."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 2, 4
        self.qkv, self.out = nn.Linear(5, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / self.dim**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, self.heads * self.dim))


class Attention(nn.Module):
    """The attention of a vision transformer, as image model libraries write it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.num_heads, self.head_dim, self.attn_dim = 4, 4, 16
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "fused":
            x = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "stored scale":
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            x = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), Attention(form), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.Sequential(Block(form), Block(form))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def shrunk(model: nn.Module, x: Tensor, kinds: tuple[str, ...]) -> tuple[Program, RemovalRecord]:
    """Return the program of ``model`` without every second index of the groups of these kinds, and the record."""
    graph = depgraph(capture(model, (x,)))
    keep = {g.name: list(range(0, g.size, 2)) for g in graph.groups if g.kind in kinds}
    assert keep
    program = graph.program.copy()
    return program, resize(program, keep)


def check_equal(small: nn.Module, program: Program, x: Tensor) -> None:
    with torch.no_grad():
        got, want = small(x), program(x)
    assert got.shape == want.shape and want.std() > 1e-2, "an output near zero compares with anything"
    assert (got - want).abs().max() <= CLOSE * want.abs().max()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kinds", "sizes"), [(HEADS, (1, 4)), (WIDTHS, (2, 2)), (HEADS + WIDTHS, (1, 2))])
def test_a_size_and_the_scale_derived_from_it_are_found_together(kinds, sizes) -> None:
    torch.manual_seed(0)
    model = Fused().eval()
    program, record = shrunk(model, normal(4, 6, 5), kinds)
    small = write_back(model, program, record)
    assert (small.heads, small.dim) == sizes
    check_equal(small, program, normal(3, 6, 5))


@pytest.mark.parametrize("form", ["stored scale", "derived scale", "fused"])
@pytest.mark.parametrize(("kinds", "sizes"), [(HEADS, (2, 4)), (WIDTHS, (4, 2)), (HEADS + WIDTHS, (2, 2))])
def test_a_vision_transformer_is_written_back(form, kinds, sizes) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(form).eval()
    program, record = shrunk(model, normal(2, 3, 8, 8), kinds)
    small = write_back(model, program, record)
    for attention in (m for m in small.modules() if isinstance(m, Attention)):
        assert (attention.num_heads, attention.head_dim) == sizes
        assert attention.qkv.out_features == 3 * sizes[0] * sizes[1]
    check_equal(small, program, normal(3, 3, 8, 8))


class Faint(nn.Module):
    """Attention whose scores are so small that no module's values tell whether their scale is right."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        with torch.no_grad():
            self.qkv.weight[:32] *= share

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_scale_that_hardly_shows_is_made_up_for(share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Faint(share), nn.LayerNorm(16), Faint(share)).eval()
    program, record = shrunk(model, normal(2, 5, 16), WIDTHS)
    small = write_back(model, program, record)
    check_equal(small, program, normal(3, 5, 16))


@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm_is_written_back_in_either_mode(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3))
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program, record = shrunk(model, normal(4, 5), ("channel", "hidden"))
    small = write_back(model, program, record)
    assert small.training is training and model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert small.eval()[0].weight.shape == (4, 5)  # pyright: ignore[reportIndexIssue]
    check_equal(small, program, normal(6, 5))
