"""LSTM layers with projections: the same numbers without, and a file that ONNX Runtime runs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.flat import flat_program
from graphwright.backends.onnx_cleanup import clean_up
from graphwright.backends.onnx_recurrent import projected_lstm
from graphwright.frontends.capture import capture

CASES = [
    {},
    {"num_layers": 2, "batch_first": True},
    {"bidirectional": True, "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"proj_size": 8, "hidden_size": 9},
]


def layer(**options: object) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(**({"input_size": 5, "hidden_size": 8, "proj_size": 3} | options)).double().eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("steps", [1, 4])
def test_projected_lstm_equals_the_layer_from_a_given_state(options: dict, steps: int) -> None:
    lstm = layer(**options)
    batch, runs = 2, lstm.num_layers * (2 if lstm.bidirectional else 1)
    shape = (batch, steps, 5) if lstm.batch_first else (steps, batch, 5)
    x = torch.randn(shape, dtype=torch.float64)
    h = torch.randn(runs, batch, lstm.proj_size, dtype=torch.float64)
    c = torch.randn(runs, batch, lstm.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        output, (last, cell) = lstm(x, (h, c))
        got = projected_lstm(
            x, (h, c), list(lstm.parameters()), lstm.bias, lstm.num_layers, 0.0, False, lstm.bidirectional,
            lstm.batch_first,
        )  # fmt: skip
    for value, want in zip(got, (output, last, cell), strict=True):
        # The products are summed in another order; float64 leaves ten digits of room.
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12)
        assert want.abs().max() > 1e-2


class Recurrent(nn.Module):
    def __init__(self, proj_size: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lstm = nn.LSTM(5, 8, num_layers=2, proj_size=proj_size, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        output, (last, cell) = self.lstm(x)
        return [output, last, cell]


def test_only_projected_layers_are_replaced() -> None:
    x = torch.randn(2, 4, 5)
    for size, counts in ((3, {"aten.lstm.input": 1}), (0, {})):
        assert clean_up(flat_program(capture(Recurrent(size).eval(), (x,))).module) == counts


def test_projected_lstm_runs_in_onnx_runtime_at_another_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from graphwright.backends.onnx_export import export_onnx

    model = Recurrent(3).eval()
    artifact = export_onnx(capture(model, (torch.randn(2, 4, 5),)), tmp_path)
    x = torch.randn(5, 4, 5)
    with torch.no_grad():
        for got, want in zip(artifact.runner()(x), model(x), strict=True):
            # Rounding of float32: states are at most 1, sums have some ten terms.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert want.abs().max() > 1e-2
