"""Numbers of the paper's algorithm: published widths and costs, and a counter that sees functional operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graphwright.frontends.capture import capture
from graphwright.graph.cost import cost
from graphwright.graph.program import Program
from graphwright.passes.base import Pipeline
from graphwright.passes.eliminate_dead_code import EliminateDeadCode
from graphwright.passes.remove_channels import RemoveChannels


class Basic(nn.Module):
    """ResNet's basic block."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        short = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        self.short = short if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def resnet18(stem: int = 64, width: float = 1.0) -> nn.Module:
    """ResNet-18 for 1000 classes, with every width times ``width``."""
    widths = [int(w * width) for w in (stem, 64, 128, 256, 512)]
    blocks = [
        block
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        for block in (Basic(a, b, 2 if i else 1), Basic(b, b, 1))
    ]
    start = [nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000)]
    return nn.Sequential(*start, *blocks, *end)


def published_macs(program: Program) -> int:
    """Multiply-accumulates as the published figures count them.

    Weight layers, and besides: two for each element that a batch norm gives, one for each element that a rectifier
    gives, and one for each element that a pooling reads. Biases count nothing.
    """
    extra = 0
    for node in program.nodes:
        name = str(node.target)
        if "batch_norm" in name:
            extra += 2 * node.meta["val"].numel()
        elif "relu" in name:
            extra += node.meta["val"].numel()
        elif "pool" in name and node.op == "call_function":
            extra += node.args[0].meta["val"].numel()  # type: ignore[union-attr]
    return cost(program).total_macs + extra


def test_resnet18_at_224_loses_half_of_every_width_and_reaches_the_published_cost() -> None:
    with torch.device("meta"):
        program = capture(resnet18().eval(), (torch.empty(1, 3, 224, 224),), dynamic={})
    done = Pipeline([RemoveChannels(ratio=0.5, scope="local", criterion="random")])(program)
    result = done.records[0].result

    # 1.822 -> 0.487 G and 11.69 -> 3.06 M; the rule is that every width but the classifier's output halves.
    assert round(published_macs(program) / 1e9, 3) == 1.822
    assert round(published_macs(done.output) / 1e9, 3) == 0.487
    assert round(result.stats["parameters_before"] / 1e6, 2) == 11.69
    assert round(result.stats["parameters_after"] / 1e6, 2) == 3.06
    assert {len(cut.kept) * 2 == cut.of for cut in done.removal.groups.values()} == {True}
    assert len(done.removal.groups) == result.stats["groups"] == 12


def test_the_pruned_resnet18_has_the_tensors_and_cost_of_one_built_at_half_width() -> None:
    with torch.device("meta"):
        program = capture(resnet18().eval(), (torch.empty(1, 3, 224, 224),), dynamic={})
        half = resnet18(width=0.5)
        built = capture(half.eval(), (torch.empty(1, 3, 224, 224),), dynamic={})
    output = Pipeline([RemoveChannels(ratio=0.5, criterion="random")])(program).output

    assert {n: t.shape for n, t in output.tensors().items()} == {n: t.shape for n, t in half.state_dict().items()}
    assert cost(output).total_macs == cost(built).total_macs
    assert cost(output).activation_bytes == cost(built).activation_bytes


def test_widths_fall_by_the_same_amount_in_each_step_of_an_iterative_schedule() -> None:
    with torch.device("meta"):
        program = capture(resnet18().eval(), (torch.empty(1, 3, 224, 224),), dynamic={})
    whole = Pipeline([RemoveChannels(ratio=0.5, criterion="random", steps=4)])(program)
    first = Pipeline([RemoveChannels(ratio=0.125, criterion="random")])(program)
    assert {len(c.kept) for c in first.removal.groups.values()} == {56, 112, 224, 448}
    assert {len(c.kept) for c in whole.removal.groups.values()} == {32, 64, 128, 256}


# ---------------------------------------------------------------------- the counter


class Functional(nn.Module):
    """Attention and products that belong to no module."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.weight = nn.Linear(32, 96), nn.Linear(32, 32), nn.Parameter(torch.zeros(32, 32))
        self.down = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        b = torch.einsum("bnc,cd->bnd", a, self.weight)
        scores = torch.einsum("...nc,...mc->...nm", b, a)
        y = scores.softmax(-1) @ F.linear(b, self.weight)
        z = torch.baddbmm(torch.bmm(y, y.transpose(1, 2)), b, b.transpose(1, 2))
        picture = self.up(self.down(y.reshape(2, 4, 16, 8)))
        return self.out(y), z, torch.addmm(y[0], y[0], self.weight), picture


def flops(run: Callable[[], object]) -> int:
    """PyTorch's own count, with attention as the matrix products that it sees."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_counter_agrees_with_pytorchs_on_functional_operators() -> None:
    model, x = Functional().eval(), torch.ones(2, 16, 32)
    found = cost(capture(model, (x,), dynamic={}))

    assert found.total_macs == pytest.approx(flops(lambda: model(x)) / 2, rel=0.01)
    # What multiplies activations with each other is told apart: attention, the scores, and three products after them.
    products = {n.target for n in found.nodes if n.product}
    assert "aten.scaled_dot_product_attention.default" in products and "aten.einsum.default" in products
    weights = {"aten.linear.default", "aten.conv2d.default", "aten.conv_transpose2d.input", "aten.addmm.default"}
    assert weights.isdisjoint(products)
    assert found.product_macs == 2 * 16 * 16 * 32 * 2 + 2 * 16 * 16 * 32 * 4


def test_an_attention_block_counts_its_two_products_beside_the_projections() -> None:
    """The block that module hooks report as 0.52 M instead of 3.67 M."""
    tokens, width, heads = 196, 64, 4

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
            a = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
            return self.o(a.transpose(1, 2).flatten(2))

    class Masked(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
            mask = torch.ones(
                1, 1, tokens, tokens, dtype=torch.bool
            ).tril()  # a constant, but nothing is multiplied by it
            return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    masked = cost(capture(Masked().eval(), (torch.ones(1, tokens, width),), dynamic={}))
    assert (masked.macs, masked.product_macs) == (4 * tokens * width * width, 2 * tokens * tokens * width)
    model, x = Block().eval(), torch.ones(1, tokens, width)
    found = cost(capture(model, (x,), dynamic={}))
    assert found.macs == 4 * tokens * width * width
    assert found.product_macs == 2 * tokens * tokens * width
    assert found.total_macs == pytest.approx(flops(lambda: model(x)) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 30),
        ("bhid,bhjd->bhij", [(2, 4, 6, 3), (2, 4, 5, 3)], 2 * 4 * 6 * 5 * 3),
        ("...ij,...jk->...ik", [(7, 2, 3), (7, 3, 5)], 7 * 30),
        ("...ij,jk", [(4, 7, 2, 3), (3, 5)], 28 * 30),
        ("i...,i...->...", [(3, 4, 1), (3, 1, 5)], 3 * 20),
        ("ij,ij->", [(2, 3), (1, 3)], 6),
    ],
)
def test_an_einsum_costs_every_combination_of_its_letters(
    equation: str, shapes: list[tuple[int, ...]], macs: int
) -> None:
    class Einsum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum(equation, a, b)

    program = capture(Einsum(), tuple(torch.ones(s) for s in shapes), dynamic={})
    assert cost(program).total_macs == macs


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_cost_their_weights_at_every_step(kind: str) -> None:
    model = getattr(nn, kind)(5, 7, num_layers=2, batch_first=True)
    program = capture(model.eval(), (torch.ones(2, 6, 5),), dynamic={})
    gates = 4 if kind == "LSTM" else 3
    assert cost(program).total_macs == 2 * 6 * gates * 7 * (5 + 7 + 7 + 7)


def test_dynamic_dimensions_are_counted_at_the_example_sizes() -> None:
    for batch in (2, 5):
        assert cost(capture(nn.Linear(3, 4), (torch.ones(batch, 3),))).total_macs == 12 * batch
    # A batch of one is doubled at capture to stay dynamic, and a note says so.
    program = capture(nn.Linear(3, 4), (torch.ones(1, 3),))
    assert cost(program).total_macs == 24 and "doubled" in program.notes[0]


def test_tied_parameters_count_once_and_unread_ones_until_dead_code_is_gone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    program = capture(Tied(), (torch.ones(2, 4),))
    assert cost(program).parameters == 16 + 15
    cleaned = cost(Pipeline([EliminateDeadCode()])(program).output)
    assert cleaned.parameters == 16 and cleaned.parameter_bytes == 64
