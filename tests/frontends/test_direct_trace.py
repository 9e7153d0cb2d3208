"""Traces without torch.export: the graph that torch.export gives, or no trace at all, and modules left as they were."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import forward_ad

import graphwright as gw
from graphwright.frontends import capture as capture_module
from graphwright.frontends.capture import capture
from graphwright.frontends.direct_trace import NotDirect, direct_trace
from graphwright.graph.program import Program
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


def deep(m: Any, x: Tensor) -> Tensor:
    return x + m.tables["a"][0].setdefault("table", torch.arange(8.0))


def forward_derivative(m: Any, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m.layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


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
    "vmap": (lambda: Calls(lambda m, x: torch.vmap(lambda v: m.layer(v) * 2)(x)), "transform"),
    "data of a weight": (lambda: Calls(lambda m, x: x @ m.layer.weight.data), "no operator gave"),
    "a forward derivative": (lambda: Calls(forward_derivative), "transform"),
    "the memory of a constant": (
        lambda: Calls(lambda m, x: x + float(m.c.numpy().sum()), c=torch.ones(8)),
        "data pointer",
    ),
    "the place of a value": (
        lambda: Calls(lambda m, x: x * 2 if x.data_ptr() == (x + 1).data_ptr() else x),
        "data pointer",
    ),
    "a generator": (lambda: Calls(lambda m, x: x + torch.rand(8, generator=m.g), g=torch.Generator()), "Generator"),
    "a kept tensor": (lambda: Calls(keeping), "keeps a tensor"),
    "a collected tensor": (lambda: Calls(collecting, seen=[]), "keeps a tensor"),
    "a tensor kept deep down": (lambda: Calls(deep, tables={"a": ({},)}), "keeps a tensor"),
    "a reassigned buffer": (lambda: Calls(reassigned, buffer=torch.zeros(8)), "keeps a tensor"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_follow_is_left_to_torch_export(name: str) -> None:
    build, why = LEFT[name]
    model = build().eval()
    leaves, spec = pytree.tree_flatten(((X,), {}))
    before = {key: (value, value.copy() if isinstance(value, list) else None) for key, value in vars(model).items()}
    with pytest.raises((NotDirect, RuntimeError), match=why):
        direct_trace(model, leaves, spec, ["x"])
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[key] is value and (kept is None or value == kept) for key, (value, kept) in before.items())


def reading(m: Any, x: Tensor) -> Tensor:
    m.store["a"]["n"] += 1
    return x * m.c.item() * m.store["a"]["n"]


def test_torch_export_begins_where_the_refused_trace_began() -> None:
    model = Calls(reading, store={"a": {"n": 0}}, c=torch.tensor(1.0)).eval()
    torch.testing.assert_close(capture(model, (X,), {}, {})(X), X)
    assert model.store == {"a": {"n": 0}}


@pytest.mark.parametrize(
    "refused",
    [
        lambda m, x: m.layer(x) * x.max().item(),
        lambda m, x: m.layer(x) + x[x > 0].sum(),
        lambda m, x: in_autocast(m, x),
        lambda m, x: torch.vmap(m.layer)(x),
    ],
)
def test_a_refusal_that_forward_catches_is_one_all_the_same(refused: Callable[..., Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        try:
            return refused(m, x)
        except Exception:  # what a model may do, and what must not decide which branch is captured
            return m.layer(x) - 100

    model = Calls(forward).eval()
    torch.testing.assert_close(capture(model, (X,), {}, {})(X), model(X))


OUTSIDE: dict[str, Tensor] = {}


def test_a_tensor_that_is_kept_outside_of_the_module_is_refused_with_its_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x) + OUTSIDE.setdefault("table", torch.arange(8.0) * 2)

    with pytest.raises(gw.CaptureError, match=r"(?s)keeps a tensor outside.*aten\.mul.*test_direct_trace.*buffer"):
        capture(Calls(forward).eval(), (X,), {}, {})
    OUTSIDE.clear()


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.table.add_(1),
        lambda m: torch.add(m.table, 1, out=m.table),
        lambda m: m.table[:4].add_(m.table[4:]),
        lambda m: m.view.mul_(2),
    ],
)
def test_tensors_of_the_caller_are_not_written(write: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        write(m)
        return m.layer(x) + m.table + m.buffer

    table, buffer = torch.ones(8), torch.ones(8)
    model = Calls(forward, table=table, buffer=buffer, view=buffer[:4]).eval()
    program = direct(monkeypatch, model, (X,))
    assert torch.equal(table, torch.ones(8)) and torch.equal(buffer, torch.ones(8))
    got = [program(X) for _ in range(2)]
    assert torch.equal(table, torch.ones(8)) and torch.equal(buffer, torch.ones(8))
    want = [model(X) for _ in range(2)]
    torch.testing.assert_close(got, want)
    assert not torch.equal(want[0], want[1])


def test_a_constant_of_the_code_takes_no_name_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = nn.Parameter(torch.ones(8))
    model = Calls(lambda m, x: x + torch.tensor([5.0] * 8) + m.lifted_tensor_0, lifted_tensor_0=taken).eval()
    torch.testing.assert_close(direct(monkeypatch, model, (X,))(X), X + 6)


@pytest.mark.parametrize("change", ["transpose_(0, 1)", "unsqueeze_(1)", "resize_(3, 5)"])
def test_inputs_have_the_shape_that_they_come_with(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls(lambda m, x: eval(f"x.{change}") * 2).eval()
    program = direct(monkeypatch, model, (X.clone(),))
    gw.verify(program)
    torch.testing.assert_close(program(X.clone()), model(X.clone()))


def test_gradients_are_on_after_a_forward_that_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return m.layer(x)

    direct(monkeypatch, Calls(forward).eval(), (X,))
    assert torch.is_grad_enabled()


class Renaming(Calls):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"other.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


def test_buffers_stay_in_the_state_of_a_model_that_renames_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Renaming(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(6)).eval()
    program = direct(monkeypatch, model, (X,))
    assert {"norm.running_mean", "norm.running_var"} <= set(program.graph_module.state_dict())


def test_threads_capture_one_after_another() -> None:
    def run(_: int) -> Program:
        return capture(Calls(lambda m, x: m.layer(x).relu()).eval(), (X,), {}, {})

    call = nn.Module.__call__
    with ThreadPoolExecutor(4) as pool:
        programs = list(pool.map(run, range(8)))
    assert len(programs) == 8 and nn.Module.__call__ is call and not torch.compiler.is_exporting()


def test_a_model_that_reads_a_constant_is_captured_all_the_same() -> None:
    model = Calls(lambda m, x: x * m.c.item(), c=torch.tensor(2.0)).eval()
    program = gw.capture(model, (X,), dynamic={})
    torch.testing.assert_close(program(X), X * 2)
    (note,) = program.notes
    assert note.startswith("captured through torch.export") and "aten.item.default reads values" in note
    assert gw.capture(nn.Linear(8, 8), (X,), dynamic={}).notes == ()


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
