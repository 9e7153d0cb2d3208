"""Recurrent layers: one operator over packed gates."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ..axes import Axis
from .base import Analysis, AxesRule, Value


def recurrent(gates: int) -> Callable[[Analysis, Node], Value]:
    """Make the axes half of an LSTM (4 gates), GRU (3) or plain RNN (1).

    ``w_ih [gates * h, in]``, ``w_hh [gates * h, h]``, two biases, per layer and direction, and with a projection
    ``w_hr [p, h]``. One state tensor holds all layers and directions, so they share the hidden axis.
    """

    def axes(an: Analysis, node: Node) -> Value:
        x = an.of(node.args[0])
        states = [an.of(s) for s in (node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]])]
        weights, has_biases, layers = node.args[2:5]
        bidirectional, batch_first = node.args[7:9]
        assert isinstance(weights, (list, tuple)) and isinstance(layers, int)
        directions = 2 if bidirectional else 1
        per_cell = len(weights) // (layers * directions)
        projected = per_cell == (5 if has_biases else 3)
        cells = [[an.of(w) for w in weights[i : i + per_cell]] for i in range(0, len(weights), per_cell)]
        hidden = states[-1][-1] if gates == 4 else states[0][-1]
        out_width = states[0][-1]
        if not projected:
            an.unify(hidden, out_width)
        batch, time = (0, 1) if batch_first else (1, 0)
        if len(x) == 3:
            an.freeze(x[time], "time steps")
            an.unify(x[batch], states[0][1])
        feed = x[-1]
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                _cell(an, cells[layer * directions + direction], gates, feed, hidden, out_width, projected)
                outputs.append(out_width)
            feed = an.concat(outputs)
        for state in states:
            an.freeze(state[0], "layers and directions")
        result = (*x[:-1], feed)
        return (result, *states)

    return axes


def _cell(an: Analysis, cell: list, gates: int, feed: Axis, hidden: Axis, out: Axis, projected: bool) -> None:
    w_ih, w_hh, *rest = cell
    packed = an.concat([hidden] * gates)
    an.unify(w_ih[0], packed)
    an.unify(w_hh[0], packed)
    an.unify(w_ih[1], feed)
    an.unify(w_hh[1], out)
    if projected:
        w_hr = rest.pop()
        an.unify(w_hr[0], out)
        an.unify(w_hr[1], hidden)
    for bias in rest:
        an.unify(bias[0], packed)


RULES: dict[str, AxesRule] = {
    "lstm": AxesRule(recurrent(4)),
    "gru": AxesRule(recurrent(3)),
    "rnn_tanh": AxesRule(recurrent(1)),
    "rnn_relu": AxesRule(recurrent(1)),
}
