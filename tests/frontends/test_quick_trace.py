"""Shortcuts through torch.export: the same graph with its names, origins and shapes, and torch left as it was."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.frontends import quick_trace
from graphwright.frontends.quick_trace import SHORTCUTS, Shortcut


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.add: Tensor
        self.register_buffer("add", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            table = torch.arange(6.0).cos() * self.add
        return x + self.linear(self.norm(x)).tanh() * torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]) + table


class Model(nn.Module):
    """Layers that are called twice, a branch on a size, a region without gradients, constants in the code, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(9, 6), nn.ModuleList([Block(), Block()]), nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.embed(ids)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        first, second = x.split([2, 4], -1) if ids.shape[0] < 50 else x.split([3, 3], -1)
        return {"logits": self.head(x), "parts": (first, second.mean(0))}


def described(program: gw.Program) -> list[tuple[Any, ...]]:
    """Return what is known of every node: its call, its name, where it comes from and what it makes."""
    rows = []
    for node in program.nodes:
        value = node.meta.get("val")
        shape = (tuple(map(str, value.shape)), value.dtype, value.stride()) if isinstance(value, Tensor) else value
        origin = node.meta.get("stack_trace"), node.meta.get("nn_module_stack")
        rows.append((node.op, node.name, str(node.target), str(node.args), str(node.kwargs), origin, str(shape)))
    return rows


@pytest.mark.parametrize("dynamic", [None, {}])
def test_the_program_is_the_one_without_shortcuts(
    dynamic: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = Model().eval(), torch.arange(12).view(3, 4) % 9
    quick = gw.capture(model, (ids,), dynamic=dynamic)
    monkeypatch.setattr(quick_trace, "SHORTCUTS", ())
    slow = gw.capture(model, (ids,), dynamic=dynamic)

    rows = described(quick)
    assert rows == described(slow)
    assert quick.guards == slow.guards and bool(quick.guards) == (dynamic is None)
    assert {k: id(t) for k, t in quick.parameters().items()} == {k: id(t) for k, t in slow.parameters().items()}
    assert quick.graph_module.state_dict().keys() == slow.graph_module.state_dict().keys()
    traced = [row[5][0] for row in rows if row[0] == "call_function"]
    assert all(text and __file__ in text and "in forward" in text for text in traced) and len(set(traced)) > 6
    torch.testing.assert_close(quick(ids), model(ids))


@pytest.mark.parametrize("shortcut", SHORTCUTS, ids=lambda s: s.name)
def test_this_torch_has_a_place_for_every_shortcut(shortcut: Shortcut) -> None:
    original = getattr(import_module(shortcut.module), shortcut.name)
    assert shortcut.make(original) is not original


def test_torch_is_as_before_after_a_capture_and_after_one_that_fails() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    before = [getattr(import_module(s.module), s.name) for s in SHORTCUTS]
    gw.capture(Model(), (torch.zeros(2, 4, dtype=torch.long),))
    with pytest.raises(gw.CaptureError):
        gw.capture(Branching(), (torch.randn(2, 3),))
    after = [getattr(import_module(s.module), s.name) for s in SHORTCUTS]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_shortcuts_that_this_torch_has_no_place_for_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(original: Any) -> Any:
        raise AttributeError("a private name that is gone")

    absent = (
        Shortcut("torch.fx.proxy", "NoSuchName", lambda original: original),
        Shortcut("torch.no_such_module", "name", lambda original: original),
        Shortcut("torch.fx.proxy", "CapturedTraceback", unusable),
    )
    monkeypatch.setattr(quick_trace, "SHORTCUTS", absent)
    x = torch.randn(2, 6)
    model = Block().eval()
    torch.testing.assert_close(gw.capture(model, (x,))(x), model(x))


def test_constants_of_the_code_are_part_of_the_state_and_buffers_that_are_not_persistent_are_not() -> None:
    program = gw.capture(Model().eval(), (torch.zeros(2, 4, dtype=torch.long),))
    state = set(program.graph_module.state_dict())
    buffers = {name for name, _ in program.graph_module.named_buffers()}
    assert "blocks.0.add" in buffers - state
    assert any("lifted_tensor" in name for name in state)
