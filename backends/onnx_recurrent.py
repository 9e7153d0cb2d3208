"""Projected LSTM layers, which ONNX does not have, as LSTM layers and matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def has_projection(call: Mapping[str, Any]) -> bool:
    """Whether a call of ``aten.lstm.input`` projects its hidden state (``proj_size``), which the exporter ignores."""
    runs = call["num_layers"] * (2 if call["bidirectional"] else 1)
    return len(call["params"]) == runs * (5 if call["has_biases"] else 3)


def projected_lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``lstm`` with projections, as one ``lstm`` without for each layer and direction.

    The hidden state h = P u of a projected layer is read by the gates as W_h h = (W_h P) u, so that the layer is one
    whose hidden state is u, and P comes after it. Only the first h is given, not made by P: its share W_h h enters as
    further features of the first step's input.
    """
    x = input.transpose(0, 1) if batch_first else input  # [time, batch, features]
    directions, size = (2 if bidirectional else 1), (5 if has_biases else 3)
    hidden, cells = list[Tensor](), list[Tensor]()
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            run = layer * directions + direction
            weights = params[run * size : (run + 1) * size]
            output, h, c = _one_direction(x, hx[0][run], hx[1][run], weights, backwards=direction == 1)
            outputs.append(output)
            hidden.append(h)
            cells.append(c)
        x = torch.cat(outputs, -1)
    return (x.transpose(0, 1) if batch_first else x), torch.stack(hidden), torch.stack(cells)


def _one_direction(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], *, backwards: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # x: [time, batch, features]; h: [batch, projected]; c: [batch, hidden]
    from_input, from_hidden, *biases, projection = weights
    x = x.flip(0) if backwards else x
    first = F.pad(h[None], (0, 0, 0, 0, 0, x.shape[0] - 1))  # zero but for the first step
    merged = [torch.cat([from_input, from_hidden], 1), from_hidden @ projection, *biases]
    state = [torch.zeros_like(c)[None], c[None]]
    output, last, cell = aten.lstm.input(
        torch.cat([x, first], -1), state, merged, bool(biases), 1, 0.0, False, False, False
    )
    output = F.linear(output, projection)
    return (output.flip(0) if backwards else output), F.linear(last[0], projection), cell[0]
