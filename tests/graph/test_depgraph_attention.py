"""Attention and recurrent layers: heads, head dims and hidden units, in sizes that must not cycle, without patching."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import DepGraph, depgraph
from graphwright.graph.oracle import masked_outputs, masked_parameters
from graphwright.graph.resize import resize
from graphwright.passes.base import Pipeline
from graphwright.passes.remove_channels import RemovalResult, RemoveChannels
from graphwright.tools.sweep import difference, floats, in_float64, outputs_of, random_keep
from graphwright.tools.zoo import ZOO, missing
from graphwright.tools.zoo.entry import Case

HEAD_DIM, WIDTH = 4, 12
EVERYTHING: dict[str, Any] = {"ratio": 0.5, "head_ratio": 0.5, "head_group_ratio": 0.5, "head_dim_ratio": 0.5}


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: halves are rotated as pairs."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Grouped(nn.Module):
    """Residual layers of grouped-query attention."""

    cos: Tensor
    sin: Tensor

    def __init__(self, heads: int, kv_heads: int, rotary: bool, layers: int = 1) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.rotary = heads, kv_heads, rotary
        self.inp, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {n: nn.Linear(WIDTH, count * HEAD_DIM) for n, count in sizes.items()}
                | {"o": nn.Linear(heads * HEAD_DIM, WIDTH)}
            )
            for _ in range(layers)
        )
        angles = torch.arange(6)[:, None] / 10.0 ** torch.arange(HEAD_DIM // 2)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def repeated(self, x: Tensor) -> Tensor:
        """(batch, kv, n, d) to (batch, heads, n, d), as language models write it."""
        b, kv, n, d = x.shape
        times = self.heads // self.kv_heads
        return x[:, :, None].expand(b, kv, times, n, d).reshape(b, kv * times, n, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        layer: Any
        for layer in self.layers:
            q, k, v = (layer[n](h).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for n in "qkv")
            if self.rotary:
                q, k = turned(q, self.cos, self.sin), turned(k, self.cos, self.sin)
            a = F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v))
            h = h + layer["o"](a.transpose(1, 2).flatten(2))
        return self.out(h)


def grouped(*args: Any, **more: Any) -> tuple[nn.Module, Tensor, DepGraph]:
    torch.manual_seed(0)
    model = Grouped(*args, **more).double().eval()
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, x, depgraph(capture(model, (x,)))


HEADS = [(4, 2), (8, 2), (8, 4), (4, 1)]


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_grouped_query_attention_loses_heads_query_heads_and_head_dims_exactly(
    heads: int, kv_heads: int, rotary: bool
) -> None:
    model, x, graph = grouped(heads, kv_heads, rotary)
    sizes = {g.kind: g.size for g in graph.groups if g.kind != "hidden"}
    # Rotated pairs of head dims go together; with one kv head there is none to spare, and its query heads are heads.
    want = {"head": kv_heads, "head group": heads // kv_heads, "value dim": HEAD_DIM}
    want = {k: v for k, v in want.items() if v > 1} | {"head dim": HEAD_DIM // 2 if rotary else HEAD_DIM}
    assert sizes == want
    assert {g.exactness for g in graph.groups} == {"exact"}
    assert sum(node[0] == "axis" for node in graph.coupling) < 40

    generator = torch.Generator().manual_seed(heads + kv_heads)
    for groups in (*([g] for g in graph.groups), list(graph.groups)):
        smaller = graph.program.copy()
        record = resize(smaller, {g.name: random_keep(g, generator) for g in groups})
        masked = torch.func.functional_call(model, masked_parameters(model, record), (x,))
        torch.testing.assert_close(smaller(x), masked, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(masked, model(x), rtol=1e-4)


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_the_analysis_grows_by_the_same_number_of_axes_with_every_layer(rotary: bool) -> None:
    counts = []
    for layers in (1, 2, 3):
        _, _, graph = grouped(8, 2, rotary, layers=layers)
        start = time.process_time()
        depgraph(graph.program).groups  # noqa: B018 (computed on access)
        assert time.process_time() - start < 1.0 * layers
        counts.append(sum(node[0] == "axis" for node in graph.coupling))
    assert counts[2] - counts[1] == counts[1] - counts[0] < 30


def test_heads_and_query_heads_per_head_go_by_their_own_ratios() -> None:
    model, x, graph = grouped(8, 2, True)
    options: dict[str, Any]
    for options, after in (
        ({"head_ratio": 0.5}, {"head": 1, "head group": 4, "head dim": 2, "value dim": 4}),
        ({"head_group_ratio": 0.5}, {"head": 2, "head group": 2, "head dim": 2, "value dim": 4}),
        ({"head_dim_ratio": 0.5}, {"head": 2, "head group": 4, "head dim": 1, "value dim": 2}),
    ):
        done = Pipeline([RemoveChannels(ratio=0, **options)])(graph.program)
        result = done.records[0].result
        assert isinstance(result, RemovalResult)
        assert {w.kind: w.after for w in result.widths if w.kind != "hidden"} == after
        masked = torch.func.functional_call(model, masked_parameters(model, done.removal), (x,))
        torch.testing.assert_close(done.output(x), masked, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- recurrent layers and torch's own attention


@pytest.mark.parametrize("name", ["lstm_1", "lstm_bi_2", "gru_2", "mha"])
def test_single_and_double_precision_have_the_same_groups_and_the_same_removal(name: str) -> None:
    single = ZOO[name].build()
    graphs = [depgraph(capture(c.model, c.args, c.kwargs, c.dynamic)) for c in (single, in_float64(ZOO[name].build()))]
    shapes = [
        [(g.name, g.kind, g.size, g.exactness, [(m.name, m.dim) for m in g.members]) for g in graph.groups]
        for graph in graphs
    ]
    assert shapes[0] == shapes[1] and shapes[0]

    generator = torch.Generator().manual_seed(0)
    keep = {g.name: random_keep(g, generator) for g in graphs[0].groups}
    outputs = []
    for graph in graphs:
        smaller = graph.program.copy()
        resize(smaller, keep)
        args, kwargs = graph.program.example_inputs()
        outputs.append(floats([o.double() for o in outputs_of(smaller, Case(single.model, args, kwargs))]))
    # Single precision, a few recurrent steps.
    assert difference(*outputs) < 1e-4


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)], ids=["one_layer", "two_layers_both_directions"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_hidden_and_input_units_are_groups_with_every_gate(kind: str, layers: int, both: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(3, 4), nn.Linear(5 * (1 + both), 2)
            self.rnn = getattr(nn, kind)(4, 5, num_layers=layers, batch_first=True, bidirectional=both)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(self.inp(x))[0])

    with torch.device("meta"):
        graph = depgraph(capture(Recurrent().eval(), (torch.empty(2, 6, 3),)))
    gates = 4 if kind == "LSTM" else 3
    (inputs,) = [g for g in graph.groups if g.size == 4]
    hidden = [g for g in graph.groups if g.size == 5]

    assert {(m.name, m.dim) for m in inputs.members} >= {("inp.weight", 0), ("rnn.weight_ih_l0", 1)}
    names = {(m.name, m.dim): m.positions().shape for g in hidden for m in g.members}
    for layer in range(layers):
        for suffix in ("", "_reverse")[: 1 + both]:
            assert names[f"rnn.weight_hh_l{layer}{suffix}", 1] == (5, 1)
            assert names[f"rnn.weight_hh_l{layer}{suffix}", 0] == (5, gates)
            assert names[f"rnn.weight_ih_l{layer}{suffix}", 0] == (5, gates)
    assert ("out.weight", 1) in names


# ---------------------------------------------------------------------- library models, no attribute patched by hand

LIBRARY = [
    *["vit", "bert", "llama_gqa", "hangs/sam_encoder"],
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "vae_full", "unet2d", "unet_sd15")),
]


@pytest.mark.parametrize("name", LIBRARY)
def test_library_models_run_after_losing_half_of_everything_and_equal_the_oracle(name: str) -> None:
    entry = ZOO[name]
    if missing(entry):
        pytest.skip(f"needs {missing(entry)}")
    case = in_float64(entry.build())
    program = capture(case.model, case.args, case.kwargs, case.dynamic)
    graph = depgraph(program)
    done = Pipeline([RemoveChannels(**EVERYTHING)])(program)
    result = done.records[0].result

    assert isinstance(result, RemovalResult)
    assert result.stats["groups_shrunk"] == result.stats["groups"] == len(graph.groups)
    assert result.stats["parameters_after"] < 0.5 * result.stats["parameters_before"]
    keep = {group: list(cut.kept) for group, cut in done.removal.groups.items()}
    want = floats(masked_outputs(graph, keep, program.flatten(*case.args, **case.kwargs)))
    # Every shape and index right, statistics over the kept channels.
    assert difference(outputs_of(done.output, case), want) < 1e-9


@pytest.mark.parametrize("name", [n for n in ZOO if n.startswith("hangs/") and ZOO[n].requires != ("transformers",)])
def test_models_on_which_index_maps_never_end_are_analysed_in_a_bounded_number_of_axes(name: str) -> None:
    entry = ZOO[name]
    if missing(entry):
        pytest.skip(f"needs {missing(entry)}")
    case = entry.build()
    program = capture(case.model, case.args, case.kwargs, case.dynamic)
    graph = depgraph(program)
    axes = sum(node[0] == "axis" for node in graph.coupling)
    assert graph.groups
    assert axes < 20 * sum(1 for _ in program.nodes)


class Contracted(nn.Module):
    """Two activations in an einsum, without a softmax anywhere."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.a, self.c, self.b = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(64 if "->bcd" in equation else 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum(self.equation, self.a(x), self.c(x))
        return self.b(out.flatten(1) if out.dim() > 1 else out[:, None])


@pytest.mark.parametrize("equation", ["bc,bd->bcd", "bc,bc->b"])
def test_an_einsum_without_a_softmax_is_no_attention(equation: str) -> None:
    torch.manual_seed(0)
    program = capture(Contracted(equation).eval(), (torch.randn(4, 5),))
    assert {group.kind for group in depgraph(program).groups} == {"hidden"}
    done = Pipeline([RemoveChannels(ratio=0.5)])(program)
    assert done.output.tensors()["a.weight"].shape == (4, 5)
