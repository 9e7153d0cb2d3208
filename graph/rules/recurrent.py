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
        # Packed sequences come as rows of all steps, with the number of sequences per step as second argument.
        packed = node.target._overloadname == "data"  # type: ignore[union-attr]
        arguments = [*node.args[:1], *node.args[2:], False] if packed else node.args
        given, weights, has_biases, layers, _, _, bidirectional, batch_first = arguments[1:9]
        x = an.of(node.args[0])
        states = [an.of(s) for s in (given if isinstance(given, (list, tuple)) else [given])]
        assert isinstance(weights, (list, tuple)) and isinstance(layers, int)
        directions = 2 if bidirectional else 1
        per_cell = len(weights) // (layers * directions)
        projected = per_cell == (5 if has_biases else 3)
        cells = [[an.of(w) for w in weights[i : i + per_cell]] for i in range(0, len(weights), per_cell)]
        hidden = states[-1][-1] if gates == 4 else states[0][-1]
        out_width = states[0][-1]
        if projected:
            # That the two widths differ is how the operator knows of the projection.
            an.freeze(hidden, "the cell must stay wider than its projection")
        else:
            an.unify(hidden, out_width)
        for state in states[1:]:
            an.unify(state[1], states[0][1])
        if packed:
            an.freeze_all((x[0], *an.of(node.args[1]), states[0][1]), "packed sequences")
        else:
            batch, time = (0, 1) if batch_first else (1, 0)
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


def cell(gates: int) -> Callable[[Analysis, Node], Value]:
    """Make the axes half of one step of an LSTM, GRU or plain RNN: ``x[b, in]``, state, weights and biases of one cell."""

    def axes(an: Analysis, node: Node) -> Value:
        given = node.args[1]
        states = [an.of(s) for s in (given if isinstance(given, (list, tuple)) else [given])]
        x, weights = an.of(node.args[0]), [an.of(w) for w in node.args[2:]]
        hidden = states[0][-1]
        for state in states:
            an.unify(state[-1], hidden)
            an.unify_all(state[:-1], x[:-1])
        _cell(an, [w for w in weights if w], gates, x[-1], hidden, hidden, projected=False)
        return tuple((*x[:-1], hidden) for _ in states) if gates == 4 else (*x[:-1], hidden)

    return axes


RULES: dict[str, AxesRule] = {
    "lstm": AxesRule(recurrent(4)),
    "gru": AxesRule(recurrent(3)),
    "rnn_tanh": AxesRule(recurrent(1)),
    "rnn_relu": AxesRule(recurrent(1)),
    "lstm_cell": AxesRule(cell(4)),
    "gru_cell": AxesRule(cell(3)),
    "rnn_tanh_cell": AxesRule(cell(1)),
    "rnn_relu_cell": AxesRule(cell(1)),
}
