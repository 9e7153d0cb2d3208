"""Calls of a program in every form that the captured forward takes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphwright as gw
from graphwright.graph.known_calls import KnownCalls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, time: Tensor, bias: Tensor | None = None, *, scale: float = 2.0, return_dict: bool = True
    ) -> Any:
        y = self.a(x) * scale + time
        y = y if bias is None else y + bias
        return {"out": y} if return_dict else (y,)


X, T, B = torch.randn(3, 4), torch.tensor(0.5), torch.randn(3, 4)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def program(net: Net) -> gw.Program:
    return gw.capture(net, (X[:2], T), {"return_dict": False})


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, T), {"return_dict": False}),
        ((X,), {"time": T, "return_dict": False}),
        ((), {"return_dict": False, "time": T, "x": X}),
        ((X, T, None), {"return_dict": False}),
        ((X, T), {"bias": None, "scale": 2.0, "return_dict": False}),
    ],
)
def test_inputs_by_position_or_name_and_defaults_given_again(net, program, args, kwargs) -> None:
    assert torch.equal(program(*args, **kwargs)[0], net(*args, **kwargs)[0])
    assert torch.equal(program.module()(*args, **kwargs)[0], net(*args, **kwargs)[0])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, T), {}, "'return_dict' was captured as the constant False, got True"),
        ((X, T, B), {"return_dict": False}, "input 'bias' of Net had its default None when it was captured"),
        ((X, T), {"scale": 3.0, "return_dict": False}, "input 'scale' of Net had its default 2.0"),
        ((X, T), {"scale": 2, "return_dict": False}, "input 'scale' of Net had its default 2.0"),
        ((X,), {"return_dict": False}, "input 'time' of Net is missing; it was captured with x, time, return_dict"),
        ((X, T), {"x": X, "return_dict": False}, "input 'x' of Net is given by position and by name"),
        ((X, T), {"steps": 3, "return_dict": False}, "Net has no input 'steps'"),
        ((X, T, None, 1.0), {}, r"Net takes 3 inputs by position \(x, time, bias\), got 4"),
    ],
)
def test_other_inputs_are_refused_in_one_sentence(program, args, kwargs, message: str) -> None:
    with pytest.raises(gw.InputError, match=message) as caught:
        program(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["position", "name", "other order"])
@pytest.mark.parametrize(
    ("x", "time", "message"),
    [
        (X.double(), T, "input 'x' must have dtype torch.float32, got torch.float64"),
        (torch.zeros(3, 5), T, r"input 'x' must have shape \[.*4\], got \[3, 5\]"),
        ([X, X], T, "input 'x' of Net was captured as one value, got list"),
        (X, None, "input 'time' must be a tensor, got NoneType"),
    ],
)
def test_a_form_of_call_that_came_before_is_looked_at_again(net, program, form: str, x, time, message: str) -> None:
    def call(x: Any, time: Any) -> Any:
        match form:
            case "position":
                return program(x, time, return_dict=False)
            case "name":
                return program(x=x, time=time, return_dict=False)
        return program(return_dict=False, time=time, x=x)

    for inputs in ((X, T), (X + 1, T), (torch.randn(5, 4), T * 3)):
        assert torch.equal(call(*inputs)[0], net(*inputs, return_dict=False)[0])
    with pytest.raises(gw.InputError, match=message):
        call(x, time)
    with pytest.raises(gw.InputError, match="'return_dict' was captured as the constant False, got 0"):
        program(X, T, return_dict=0)
    assert torch.equal(call(X, T)[0], net(X, T, return_dict=False)[0])


def test_a_form_of_call_is_forgotten_when_the_inputs_become_others(net) -> None:
    program = gw.capture(net, (X[:2], T), {"return_dict": False})
    want = program(X, T, return_dict=False)[0]
    other = gw.capture(net, (X[:2], T, B[:2]), {"return_dict": False})
    for name in ("graph_module", "inputs", "in_spec", "guards", "example"):
        setattr(program, name, getattr(other, name))
    with pytest.raises(gw.InputError, match="input 'bias' must be a tensor"):
        program(X, T, return_dict=False)
    assert torch.equal(program(X, T, B, return_dict=False)[0], want + B)


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor, mode: str = "sum") -> Tensor:
        return x + y if mode == "sum" else x - y


@pytest.fixture
def batches() -> gw.Program:
    names = {"x": {0: "batch"}, "y": {0: "batch"}}
    return gw.capture(Sum(), (torch.ones(3, 4), torch.ones(3, 4)), {"mode": "difference"}, names)


def test_sizes_that_belong_together_are_looked_at_in_every_call(batches) -> None:
    for x, y in ((2, 2), (3, 3), (2, 2)):
        assert batches(torch.ones(x, 4), torch.ones(y, 4), mode="difference").shape == (x, 4)
    for x, y in ((2, 3), (3, 2)):
        with pytest.raises(gw.InputError, match="'batch'"):
            batches(torch.ones(x, 4), torch.ones(y, 4), mode="difference")


def test_constants_are_looked_at_in_every_call_and_by_value(batches) -> None:
    x = torch.ones(2, 4)
    for mode in ("difference", "".join(["differ", "ence"])):
        assert torch.equal(batches(x, 3 * x, mode=mode), -2 * x)
    for mode in ("sum", "".join(["s", "um"])):
        with pytest.raises(gw.InputError, match="'mode' was captured as the constant 'difference', got 'sum'"):
            batches(x, x, mode=mode)


def test_a_copy_of_a_program_knows_no_calls(batches) -> None:
    x = torch.ones(2, 4)
    want = batches(x, 2 * x, mode="difference")
    copied = copy.deepcopy(batches)
    known = KnownCalls((copied.inputs,))
    known.remember(("form",))
    assert known.holds(("form",))
    assert not copy.deepcopy(known).holds(("form",))
    assert not pickle.loads(pickle.dumps(KnownCalls(("of",)))).holds(("form",))
    assert torch.equal(copied(x, 2 * x, mode="difference"), want)
    with pytest.raises(gw.InputError, match="'mode' was captured as the constant"):
        copied(x, x, mode="sum")


def test_a_trace_with_open_sizes_goes_through(batches) -> None:
    module, x, y = batches.module(), torch.randn(2, 4), torch.randn(2, 4)
    module(x, y, mode="difference")
    traced = make_fx(lambda x, y: module(x, y, mode="difference"), tracing_mode="symbolic")(x, y)
    assert torch.equal(traced(y, x), y - x)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*deprecated:DeprecationWarning"
)
def test_a_trace_by_torch_jit_leaves_no_form_behind(batches) -> None:
    module, x, y = batches.module(), torch.randn(2, 4), torch.randn(2, 4)
    traced: Any = torch.jit.trace(lambda x, y: module(x, y, mode="difference"), (x, y), check_trace=False)
    assert torch.equal(traced(y, x), y - x)
    assert not batches.__dict__["_calls"]._forms


def test_a_flat_module_takes_what_flatten_returned(net, program) -> None:
    leaves = program.flatten(X, return_dict=False, time=T)
    assert torch.equal(program.module(flat=True)(*leaves)[0], net(X, T, return_dict=False)[0])


def test_the_signature_is_saved(program, tmp_path) -> None:
    gw.save_program(program, tmp_path / "p")
    loaded = gw.load_program(tmp_path / "p")
    assert loaded.signature == program.signature
    assert torch.equal(loaded(x=X, time=T, bias=None, return_dict=False)[0], program(X, T, return_dict=False)[0])


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return self.a(sum(xs)) + more["bias"]


def test_variable_arguments_are_passed_as_captured() -> None:
    net = Loose().eval()
    program = gw.capture(net, (X, X), {"bias": B})
    assert torch.equal(program(X, B, bias=X), net(X, B, bias=X))
    with pytest.raises(gw.InputError, match="captured with 2 positional inputs"):
        program(X, bias=X)
