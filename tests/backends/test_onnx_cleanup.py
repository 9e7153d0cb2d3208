"""Every substitute means what its operator means, and is used where it is needed only."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.backends.flat import flat_program
from graphwright.backends.onnx_cleanup import ANY_LAYOUT, SUBSTITUTES, clean_up
from graphwright.backends.onnx_export import export_onnx
from graphwright.backends.onnx_runner import OnnxRunner
from graphwright.frontends.capture import capture

aten = torch.ops.aten
G = torch.Generator().manual_seed(0)
TIES = torch.tensor([[3.0, 1.0, 3.0, 1.0], [2.0, 2.0, 1.0, 2.0]])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
EMPTY_ROWS = torch.ones(4, 4, dtype=torch.bool).tril(-1)  # the first query sees nothing

CALLS = [
    (aten.squeeze.dim, (normal(2, 3, 4), 1), {}),
    (aten.squeeze_.dim, (normal(2, 3, 4), -1), {}),
    (aten.chunk.default, (normal(7, 2), 3), {}),
    (aten.chunk.default, (normal(2, 8), 2, -1), {}),
    (aten.split.Tensor, (normal(7, 2), 3), {}),
    (aten.split.Tensor, (normal(2, 6), 3, 1), {}),
    (aten.split_with_sizes.default, (normal(2, 6), [1, 3, 2], 1), {}),
    (aten.einsum.default, ("a b c -> cab", [normal(2, 3, 4)]), {}),
    (aten.einsum.default, ("nhwpqc->nchpwq", [normal(2, 3, 4, 5, 6, 7)]), {}),
    (aten.sort.stable, (TIES,), {"stable": True, "dim": 1}),
    (aten.sort.stable, (TIES,), {"stable": True, "dim": 1, "descending": True}),
    (aten.isin.Tensor_Tensor, (torch.arange(6).reshape(2, 3), torch.tensor([1, 5])), {}),
    (aten.isin.Tensor_Tensor, (torch.arange(6), torch.tensor([[1], [5]])), {"invert": True}),
    (aten.cdist.default, (normal(2, 4, 3), normal(2, 5, 3)), {}),
    (aten.cdist.default, (normal(4, 3), normal(5, 3), 1.0), {}),
    (aten.remainder.Scalar, (torch.arange(-5, 5), 3), {}),
    (aten.remainder.Scalar, (normal(5), 2), {}),
    (aten.pow.Tensor_Scalar, (normal(5).abs(), 3), {}),
]

ATTENTION = [
    ((normal(2, 4, 8),) * 3, {}),
    ((normal(4, 8),) * 3, {"is_causal": True}),
    ((normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6)), {"scale": 0.3}),
    ((normal(2, 2, 3, 4, 8),) * 3, {}),
    ((normal(2, 4, 8),) * 3, {"attn_mask": normal(2, 4, 4)}),
    ((normal(2, 4, 8),) * 3, {"attn_mask": CAUSAL}),
    ((normal(2, 3, 4, 8),) * 3, {"attn_mask": EMPTY_ROWS}),
    ((normal(2, 3, 4, 8),) * 3, {"attn_mask": torch.tensor([[True, False, True, True]] * 2)[:, None, None]}),
    ((normal(2, 3, 4, 8),) * 3, {"attn_mask": normal(1, 3, 1, 4)}),
    ((normal(2, 4, 4, 8), normal(2, 2, 4, 8), normal(2, 2, 4, 8)), {"enable_gqa": True, "attn_mask": CAUSAL}),
    ((normal(2, 3, 4, 8), normal(2, 1, 5, 8), normal(2, 1, 5, 8)), {}),
    ((normal(2, 1, 4, 8), normal(2, 3, 5, 8), normal(1, 3, 5, 6)), {}),
    ((normal(2, 2, 3, 4, 8), normal(2, 1, 3, 4, 8), normal(2, 2, 1, 4, 8)), {}),
]


def leaves(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)  # type: ignore[call-overload]


@pytest.mark.parametrize(("op", "args", "kwargs"), CALLS)
def test_substitute_equals_its_operator(op, args: tuple, kwargs: dict) -> None:
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    expected, actual = leaves(op(*copies, **kwargs)), leaves(SUBSTITUTES[op].function(*args, **kwargs))
    assert len(expected) == len(actual)
    for want, got in zip(expected, actual, strict=True):
        # cdist sums its squares in another order.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 if op is aten.cdist.default else 0)


@pytest.mark.parametrize(("args", "kwargs"), ATTENTION)
def test_attention_substitute_equals_attention(args: tuple, kwargs: dict) -> None:
    want = F.scaled_dot_product_attention(*args, **kwargs)
    got = SUBSTITUTES[aten.scaled_dot_product_attention.default].function(*args, **kwargs)
    # Another kernel of torch may run, with other roundings.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()
    assert ANY_LAYOUT[aten.scaled_dot_product_attention.default](*args, **kwargs).shape == want.shape


def test_unsorted_topk_finds_the_same_values() -> None:
    x = normal(2, 9)
    values, indices = SUBSTITUTES[aten.topk.default].function(x, 4, 1, False, False)
    assert torch.equal(values, x.sort(1).values[:, :4])
    assert torch.equal(x.gather(1, indices), values)


class Net(nn.Module):
    """Has one call of each operator that needs its substitute, and one that does not."""

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        batch = x.shape[0]
        return [
            x.squeeze(1) + x.mean(1, keepdim=True).squeeze(1)[:, None],
            torch.cat(x.chunk(2, 0), 1).sum(-1),
            torch.stack(x.chunk(2, 2)).sum(0),
            x.chunk(4, 2)[1] + x.chunk(4, 2)[2],
            torch.einsum("bnc->cbn", x) * torch.einsum("bnc,bmc->b", x, x)[:, None],
            x.split(batch // 2, 0)[0],
            torch.sort(x.round(), dim=2, stable=True)[1],
            torch.topk(x, 2, sorted=False)[0].sum(-1),
            torch.isin(mask.sum(-1), torch.tensor([1, 2])),
            torch.cdist(x, x + 1),
            torch.remainder(torch.arange(8), batch) + torch.remainder(torch.arange(8), 3),
            x.abs() ** batch,
            F.scaled_dot_product_attention(x, x, x, attn_mask=mask),
            F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]).view(batch, -1),
            F.scaled_dot_product_attention(x[:, None].expand(-1, 5, -1, -1), x[:, None], x[:, None]),
        ]


COUNTS = {
    "aten.squeeze.dim": 1,
    "aten.chunk.default": 3,
    "aten.einsum.default": 1,
    "aten.split.Tensor": 1,
    "aten.sort.stable": 1,
    "aten.topk.default": 1,
    "aten.isin.Tensor_Tensor": 1,
    "aten.cdist.default": 1,
    "aten.remainder.Scalar": 1,
    "aten.pow.Tensor_Scalar": 1,
    "aten.scaled_dot_product_attention.default": 2,
}


@pytest.fixture(scope="module")
def program():
    x, mask = normal(4, 3, 8), torch.ones(4, 3, 3, dtype=torch.bool).tril()
    return capture(Net(), (x, mask))


def test_only_the_calls_that_need_it_are_replaced(program) -> None:
    flat = flat_program(program)
    assert clean_up(flat.module) == COUNTS
    for inputs in (program.example, (normal(6, 3, 8), torch.ones(6, 3, 3, dtype=torch.bool).tril(-1))):
        expected, actual = program.graph_module(*inputs), flat.module(*inputs)
        for want, got in zip(expected, actual, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert clean_up(flat.module) == {}


@pytest.mark.parametrize("equation", ["abc->ab", "aac->ac", "a...->...a", "abc", "abc->abcd", "abc->abb"])
def test_an_einsum_that_does_more_than_permute_stays(equation: str) -> None:
    assert not SUBSTITUTES[aten.einsum.default].needed({"equation": equation})


class Modulated(nn.Module):
    def __init__(self, read: int) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(8, 24), read

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.linear(x).chunk(6, dim=1)[: self.read]).sum(0)


@pytest.mark.parametrize(("read", "operator"), [(2, "Slice"), (3, "Slice"), (4, "Split"), (6, "Split")])
def test_a_split_of_which_half_is_read_becomes_slices_of_what_is_read(read: int, operator: str, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, x = Modulated(read).eval(), normal(3, 8)
    export_onnx(capture(net, (x,)), tmp_path, providers=["cpu"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert (nodes.count("Slice"), nodes.count("Split")) == ((read, 0) if operator == "Slice" else (0, 1))
    (got,) = OnnxRunner(tmp_path, ["cpu"])(normal(5, 8).copy_(x[:1]))
    torch.testing.assert_close(got, net(x[:1].expand(5, 8)), rtol=1e-5, atol=1e-5)


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :0].chunk(4, 1)[0], x], 1)


def test_a_chunk_of_nothing_exports(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    x = normal(2, 8)
    export_onnx(capture(Empty().eval(), (x,)), tmp_path, providers=["cpu"])
    assert torch.equal(OnnxRunner(tmp_path, ["cpu"])(x)[0], x)


def test_program_keeps_its_operators(program) -> None:
    before = str(program.graph_module.graph)
    clean_up(flat_program(program).module)
    assert str(program.graph_module.graph) == before
    assert "scaled_dot_product_attention.default" in before


@pytest.mark.parametrize("opset", [20, 23])
def test_cleaned_graph_runs_in_onnx_runtime(program, tmp_path, opset: int) -> None:
    """The export itself compares, at batch 4 and at batch 6."""
    pytest.importorskip("onnxruntime")
    from graphwright.backends.onnx_export import export_onnx

    artifact = export_onnx(program, tmp_path, opset=opset, second_shape={"batch": 6})
    assert artifact.manifest["substituted_operators"] == COUNTS
    assert len(artifact.manifest["checks"]) == 3
