"""Recurrent layers, by the law of ``rule_oracle``. Removal equals masking every weight at the removed indices."""

from __future__ import annotations

import functools

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case
from torch import nn

table = Table()
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu")}


def layer(d: Draw, name: str, **options: bool | int) -> nn.RNNBase:
    torch.manual_seed(0)
    width, hidden = d.size(), d.size(one=False)
    return CELLS[name](width, hidden, num_layers=d.int(1, 2), bidirectional=d.flag(), bias=d.flag(), **options).double()


def states(d: Draw, module: nn.RNNBase, batch: int, name: str) -> list[torch.Tensor]:
    cells = module.num_layers * (2 if module.bidirectional else 1)
    shape = cells, batch, module.hidden_size
    if d.flag():  # torch makes one zero state for both when the user gives none
        return [torch.zeros(shape, dtype=torch.float64)] * (2 if name == "lstm" else 1)
    return [d.tensor(*shape) for _ in range(2 if name == "lstm" else 1)]


@table("lstm gru rnn_tanh rnn_relu")
def recurrent_layer(d: Draw) -> Call:
    name, batch_first = d.pick(*CELLS), d.flag()
    module = layer(d, name, batch_first=batch_first)
    batch, time = d.size(), d.int(1, 3)
    lead = (batch, time) if batch_first else (time, batch)
    x = d.tensor(*lead, module.input_size)
    hx = states(d, module, batch, name)
    weights = [p for group in module.all_weights for p in group]
    rest = module.bias, module.num_layers, 0.0, False, module.bidirectional, batch_first
    first = "f!f" if batch_first else "!ff"
    words = [first, *["!ff"] * len({id(s) for s in hx}), *("f" * w.dim() for w in weights)]
    state = hx if name == "lstm" else hx[0]
    return call(getattr(aten, name).input, x, state, weights, *rest, expect=" ".join(words), mask_all=True)


@table("lstm")
def recurrent_layer_with_a_projection(d: Draw) -> Call:
    module = layer(d, "lstm", proj_size=1)
    out = d.int(1, module.hidden_size - 1)
    module = nn.LSTM(
        module.input_size,
        module.hidden_size,
        num_layers=module.num_layers,
        bidirectional=module.bidirectional,
        bias=module.bias,
        proj_size=out,
    ).double()
    batch, cells = d.size(), module.num_layers * (2 if module.bidirectional else 1)
    x, hx = d.tensor(2, batch, module.input_size), [d.tensor(cells, batch, n) for n in (out, module.hidden_size)]
    weights = [p for group in module.all_weights for p in group]
    rest = module.bias, module.num_layers, 0.0, False, module.bidirectional, False
    cell = ["!f", "!f", *("!!" if module.bias else ""), "f!"]
    cell[0] = "!?"  # the second layer's input is the first one's output
    words = ["!ff", "!ff", "!f!", *cell * (len(weights) // len(cell))]
    return call(aten.lstm.input, x, hx, weights, *rest, expect=" ".join(words), mask_all=True)


@table("lstm gru rnn_tanh rnn_relu")
def packed_sequences(d: Draw) -> Call:
    name = d.pick(*CELLS)
    module = layer(d, name)
    sizes = torch.tensor([3, 2, 1])  # sequences of 3, 2 and 1 steps
    x, hx = d.tensor(6, module.input_size), states(d, module, 3, name)
    weights = [p for group in module.all_weights for p in group]
    rest = module.bias, module.num_layers, 0.0, False, module.bidirectional
    words = ["!f", "!", *["!!f"] * len({id(s) for s in hx}), *("f" * w.dim() for w in weights)]
    state = hx if name == "lstm" else hx[0]
    return call(getattr(aten, name).data, x, sizes, state, weights, *rest, expect=" ".join(words), mask_all=True)


@table("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def one_step(d: Draw) -> Call:
    name = d.pick("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(name, 1)
    batch, width, hidden = d.size(), d.size(), d.size(one=False)
    state = [d.tensor(batch, hidden) for _ in range(2 if gates == 4 else 1)]
    weights = [d.weight(gates * hidden, width), d.weight(gates * hidden, hidden)]
    weights += [d.weight(gates * hidden) for _ in range(2)] if d.flag() else []
    words = ["ff", *["ff"] * len(state), *("f" * w.dim() for w in weights)]
    given = state if gates == 4 else state[0]
    return call(
        getattr(aten, name).default, d.tensor(batch, width), given, *weights, expect=" ".join(words), mask_all=True
    )


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
