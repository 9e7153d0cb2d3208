"""What capture says: one sentence where it refuses, and no warning about what torch puts right again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.errors import CaptureError


@dataclasses.dataclass
class Plain:
    a: Tensor
    b: Tensor


@dataclasses.dataclass
class Registered:
    a: Tensor
    b: Tensor


torch.export.register_dataclass(Registered)


class Returns(nn.Module):
    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(5, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x), x)


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Plain) -> Tensor:
        return self.layer(x.a)


@pytest.mark.parametrize("wrap", [Plain, lambda a, b: {"inner": [Plain(a, b)]}])
def test_an_output_of_an_unknown_type_is_refused_in_one_sentence(wrap) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Returns(wrap), (torch.ones(2, 5),))
    assert str(caught.value) == (
        "Returns.forward returns an object of type Plain, which torch.export cannot take apart: use a tuple or a dict, or, "
        "if it is a dataclass, call torch.export.register_dataclass(Plain) before capture"
    )


def test_an_input_of_an_unknown_type_is_refused_in_one_sentence() -> None:
    with pytest.raises(CaptureError, match=r"^Takes\.forward is given an object of type Plain, [^\n]*$"):
        capture(Takes(), (Plain(torch.ones(2, 5), torch.ones(2, 5)),))


def test_the_advice_for_dataclasses_works() -> None:
    model, x = Returns(Registered), torch.randn(2, 5)
    result: Any = capture(model, (x,))(x)
    assert type(result) is Registered
    torch.testing.assert_close(result.a, model.layer(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x, "capture takes an nn.Module, got function '<lambda>'; give a module whose forward calls it"),
        (nn.ReLU, "capture takes an instance of ReLU, got the class; build it first"),
        (torch.ones(2), "capture takes an nn.Module, got Tensor"),
    ],
)
def test_what_is_no_module_is_refused(model: Any, message: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.ones(2, 5),))
    assert str(caught.value) == message


class Recurrent(nn.Module):
    """Recurrent layers at two depths; ``keep`` makes forward leave a tensor behind, which torch rightly warns about."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.first, self.inner = nn.LSTM(5, 3, batch_first=True), nn.Sequential(nn.GRU(3, 4, batch_first=True))
        self.keep, self.last = keep, torch.zeros(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[0]
        if self.keep:
            self.last = x
        return self.inner(x)[0]


@pytest.mark.parametrize("keep", [False, True])
def test_only_the_warning_about_restored_weight_lists_is_silent(keep: bool) -> None:
    model = Recurrent(keep)
    layers: list[Any] = [model.first, model.inner[0]]
    lists = [list(layer._flat_weights) for layer in layers]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        capture(model, (torch.randn(2, 4, 5),))
    messages = [str(w.message) for w in seen if "assigned during export" in str(w.message)]
    assert len(messages) == keep and all("self.last" in message for message in messages)
    for layer, before in zip(layers, lists, strict=True):
        assert all(a is b for a, b in zip(layer._flat_weights, before, strict=True))


@pytest.mark.parametrize("dynamic", [None, {}])
def test_an_error_of_the_models_own_is_not_hidden(dynamic: dict[str, Any] | None) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.tables = nn.Linear(5, 3), {"left": 1}

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.tables["right"]

    with pytest.raises(CaptureError, match="right") as caught:
        capture(Broken(), (torch.ones(2, 5),), dynamic=dynamic)
    causes, err = [], caught.value
    while err is not None:
        causes.append(type(err))
        err = err.__cause__
    assert KeyError in causes
