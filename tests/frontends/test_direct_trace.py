"""Traces without torch.export: the graph that torch.export gives, or no trace at all, and modules left as they were."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphwright as gw
from graphwright.frontends import capture as capture_module
from graphwright.frontends.direct_trace import NotDirect, direct_trace
from graphwright.tools.zoo import entries, missing

from .two_traces import direct, same


class Calls(nn.Module):
    """Runs a function of itself and the input."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(8, 8)
        for name, part in parts.items():
            if isinstance(part, Tensor) and name == "buffer":
                self.register_buffer(name, part, persistent=False)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0] * 2


def assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, 1:3]
    y[..., 0] = 5
    return y


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        table = m.layer(x)
    return table + x


def without_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.layer(x)


def counting(m: Any, x: Tensor) -> Tensor:
    m.calls = m.calls + 1
    m.seen.append(m.calls)
    return m.layer(x) * m.calls


def counted(m: Any, x: Tensor) -> Tensor:
    m.buffer.add_(1)
    return x + m.buffer


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "recurrent": lambda: Calls(lambda m, x: m.rnn(x), rnn=nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True)),
    "attention": lambda: Calls(lambda m, x: m.a(x, x, x), a=nn.MultiheadAttention(8, 2, batch_first=True)),
    "shared module": lambda: Calls(lambda m, x: m.layer(m.layer(x).relu())),
    "tied": lambda: Calls(lambda m, x: x @ m.other + m.layer(x), other=nn.Parameter(torch.randn(8, 8))),
    "detached weight": lambda: Calls(lambda m, x: x @ m.layer.weight.detach()),
    "parametrized": lambda: Calls(lambda m, x: m.p(x), p=nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4))),
    "autograd function": lambda: Calls(lambda m, x: Twice.apply(m.layer(x))),
    "no gradients": lambda: Calls(without_gradients),
    "autocast off": lambda: Calls(without_autocast),
    "assignment": lambda: Calls(lambda m, x: assigned(m.layer(x))),
    "input in place": lambda: Calls(lambda m, x: x.add_(1) * 2),
    "buffer in place": lambda: Calls(counted, buffer=torch.zeros(8)),
    "tensor attribute": lambda: Calls(lambda m, x: m.layer(x) + m.table, table=torch.arange(8.0)),
    "tensors in a list": lambda: Calls(lambda m, x: x + m.tables[1], tables=[torch.ones(8), torch.arange(8.0)]),
    "constants": lambda: Calls(lambda m, x: x[:, torch.tensor([0, 2])] + torch.tensor([x.shape[0] * 1.0])),
    "factories": lambda: Calls(
        lambda m, x: x + torch.arange(8, device=x.device) * torch.full((8,), 2.0) + torch.zeros(8)
    ),
    "several results": lambda: Calls(
        lambda m, x: {"parts": x.split([2, 4], 1), "top": x.topk(3)[1], "n": 3, "none": None}
    ),
    "unread results": lambda: Calls(lambda m, x: x.split([3, 5], -1)[1].unbind(1)[2]),
    "parameter returned": lambda: Calls(lambda m, x: (x + 1, m.layer.weight)),
    "attributes": lambda: Calls(counting, calls=0, seen=[]),
    "random": lambda: Calls(lambda m, x: nn.functional.dropout(x, 0.5, training=True) + torch.randn(8)),
    "complex": lambda: Calls(lambda m, x: torch.view_as_real(torch.view_as_complex(x.reshape(2, 6, 4, 2)) * 1j)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_program_is_that_of_torch_export(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same(monkeypatch, FOLLOWED[name]().eval(), (X.clone(),))


def test_layers_take_the_path_that_torch_export_sees_where_gradients_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        same(monkeypatch, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), (X,))


def test_weights_on_the_meta_device_and_keyword_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    same(monkeypatch, nn.Linear(8, 4, device="meta"), (X.to("meta"),))
    same(monkeypatch, nn.Linear(8, 4), (), {"input": X})


def test_tied_weights_have_the_name_that_torch_export_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)).eval()
    model[1].weight = model[0].weight
    same(monkeypatch, model, (torch.arange(4)[None],))


# Their hooks set an attribute, which is left to torch.export.
HOOKED = {"raises/weight_norm_old", "raises/spectral_norm_old"}
FEW = [entry for entry in entries(["odd", "torch"]) if not missing(entry) and entry.name not in HOOKED][::4]


@pytest.mark.parametrize("entry", FEW, ids=lambda entry: entry.name)
def test_architectures_of_the_zoo_give_the_program_of_torch_export(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = entry.build()
    same(monkeypatch, case.model, case.args, case.kwargs)


def keeping(m: Any, x: Tensor) -> Tensor:
    m.kept = x * 2
    return m.kept + 1


def collecting(m: Any, x: Tensor) -> Tensor:
    m.seen.append(x * 2)
    return m.layer(x)


def reassigned(m: Any, x: Tensor) -> Tensor:
    m.buffer = m.buffer + 1
    return x + m.buffer


def in_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.layer(x)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a value": (lambda: Calls(lambda m, x: x * m.c.item(), c=torch.tensor(2.0)), "item"),
    "a branch on values": (lambda: Calls(lambda m, x: x + 1 if x.sum() > 0 else x - 1), "is_nonzero"),
    "autocast": (lambda: Calls(in_autocast), "autocast"),
    "vmap": (lambda: Calls(lambda m, x: torch.vmap(lambda v: m.layer(v) * 2)(x)), "returns"),
    "data of a weight": (lambda: Calls(lambda m, x: x @ m.layer.weight.data), "no operator gave"),
    "a kept tensor": (lambda: Calls(keeping), "kept"),
    "a collected tensor": (lambda: Calls(collecting, seen=[]), "seen"),
    "a reassigned buffer": (lambda: Calls(reassigned, buffer=torch.zeros(8)), "_buffers"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_follow_is_left_to_torch_export(name: str) -> None:
    build, why = LEFT[name]
    model = build().eval()
    leaves, spec = pytree.tree_flatten(((X,), {}))
    before = {key: (value, value.copy() if isinstance(value, list) else None) for key, value in vars(model).items()}
    with pytest.raises(NotDirect, match=why):
        direct_trace(model, leaves, spec, ["x"])
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[key] is value and (kept is None or value == kept) for key, (value, kept) in before.items())


def test_a_model_that_reads_a_constant_is_captured_all_the_same() -> None:
    model = Calls(lambda m, x: x * m.c.item(), c=torch.tensor(2.0)).eval()
    torch.testing.assert_close(gw.capture(model, (X,), dynamic={})(X), X * 2)


def test_the_module_and_torch_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = nn.LSTM(8, 5)
    model = Calls(counting, calls=0, seen=[], rnn=rnn).train()
    call, flat, weights = nn.Module.__call__, list(rnn._flat_weights), dict(model.named_parameters())
    direct(monkeypatch, model, (X,))
    assert (model.calls, model.seen, model.training) == (0, [], True)
    assert nn.Module.__call__ is call
    assert all(a is b for a, b in zip(rnn._flat_weights, flat, strict=True))
    assert all(weights[name] is parameter for name, parameter in model.named_parameters())
    assert torch.ones(1).add(1).item() == 2 and not torch.compiler.is_exporting()


def test_an_error_in_forward_is_the_one_that_torch_export_reports() -> None:
    model = Calls(lambda m, x: m.layer(x[..., :5])).eval()
    call = nn.Module.__call__
    with pytest.raises(gw.CaptureError, match="could not capture Calls"):
        gw.capture(model, (X,), dynamic={})
    assert nn.Module.__call__ is call


def test_a_torch_without_the_private_parts_goes_through_torch_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphwright.frontends.direct_trace", None)
    model = Calls(lambda m, x: m.layer(x)).eval()
    torch.testing.assert_close(capture_module.capture(model, (X,), {}, {})(X), model(X))
