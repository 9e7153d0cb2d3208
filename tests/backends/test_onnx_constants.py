"""Small constants stay in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.onnx_export import export_onnx
from graphwright.backends.onnx_runner import OnnxRunner
from graphwright.frontends.capture import capture


class LinearAttention(nn.Module):
    """The denominator of linear attention, as in SANA: without its epsilon, 0 / 0."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return y / (y.sum(-1, keepdim=True) + 1e-15)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * (1 + 1e-6) - x) * 1e6


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 1e-9) * 1e9


class Constant(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, torch.full((), 1e-12)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (LinearAttention(), torch.tensor([[1.0, 2.0, -1.0], [-1.0, -2.0, -3.0]])),
        (Scaled(), torch.tensor([[4.0, 8.0], [16.0, 3.0]])),
        (Shifted(), torch.tensor([[1e-9, 3e-9], [5e-9, -2e-9]])),
    ],
    ids=["denominator", "factor", "difference"],
)
def test_number_close_to_zero_or_one_is_not_taken_for_it(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    expected = model(x)
    assert expected.isfinite().all()
    assert expected.abs().max() > 0.1
    export_onnx(capture(model, (x,)), tmp_path / "file", providers=["cpu"])
    (got,) = OnnxRunner(tmp_path / "file", providers=["cpu"])(x)
    torch.testing.assert_close(got, expected)


def test_small_constant_can_be_an_output(tmp_path: Path) -> None:
    x = torch.ones(2, 2)
    export_onnx(capture(Constant(), (x,)), tmp_path / "file", providers=["cpu"])
    outputs = OnnxRunner(tmp_path / "file", providers=["cpu"])(x)
    assert torch.equal(outputs[0], x + 1)
    assert float(outputs[1]) == pytest.approx(1e-12)
