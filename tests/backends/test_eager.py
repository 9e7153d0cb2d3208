"""The module form of a program."""

import pytest
import torch
from torch import nn

from graphwright.backends.eager import to_module
from graphwright.frontends.capture import capture


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_module_computes_what_the_captured_one_does() -> None:
    model = make_model()
    module = to_module(capture(model, (torch.randn(2, 4),)))
    x = torch.randn(5, 4)
    assert torch.equal(module(x), model(x))
    assert set(dict(module.named_parameters())) == set(dict(model.named_parameters()))


def test_compiled_module_computes_the_same() -> None:
    """The aot_eager backend traces like inductor does and needs no compiler."""
    model = make_model()
    module = to_module(capture(model, (torch.randn(2, 4),)), compile=True, backend="aot_eager")
    x = torch.randn(2, 4)
    # The same operators in the same order.
    torch.testing.assert_close(module(x), model(x), rtol=1e-6, atol=1e-6)
    assert module(x).abs().max() > 1e-2


def test_options_without_compile_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['mode'\] are for torch.compile"):
        to_module(capture(make_model(), (torch.randn(2, 4),)), mode="max-autotune")
