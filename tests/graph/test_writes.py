"""A program writes into tensors of its own, however its operators reach them, and those that share memory go on sharing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.writes import owned

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Writes(nn.Module):
    """Writes into ``a``, whose first half ``part`` shows, and reads everything."""

    def __init__(self, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.write = write
        self.a: Tensor
        self.b: Tensor
        self.part: Tensor
        self.same: Tensor
        self.register_buffer("a", torch.arange(1.0, 9.0))
        self.register_buffer("part", self.a[:4])
        self.register_buffer("same", self.a)
        self.register_buffer("b", torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        result = self.write(self, x)
        return x + self.a + self.b, self.part * 1, self.same * 1, result


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "in place": lambda m, x: m.a.add_(1),
    "a view": lambda m, x: m.a.view(2, 4)[1].mul_(2),
    "the part": lambda m, x: m.part.add_(1),
    "a piece": lambda m, x: m.a.split(4)[0].add_(1),
    "one of several": lambda m, x: m.a.view(2, 4).unbind()[1].add_(1),
    "out": lambda m, x: torch.add(m.a, 1, out=m.a),
    "a list": lambda m, x: torch._foreach_add_([m.a, m.b], 1),  # pyright: ignore[reportPrivateImportUsage] no public name
    "through type_as": lambda m, x: m.a.type_as(x).add_(1),
    "through dropout": lambda m, x: nn.functional.dropout(m.a, training=False).add_(1),
    "statistics": lambda m, x: nn.functional.batch_norm(x, m.a, m.b, training=True),
}


@pytest.mark.parametrize("dynamic", [None, {}], ids=["any batch", "one batch"])
@pytest.mark.parametrize("name", WRITES)
def test_the_callers_buffers_stay_and_the_programs_change_like_the_modules(name: str, dynamic: Any) -> None:
    model = Writes(WRITES[name]).eval()
    before = copy.deepcopy(model.state_dict())
    program = gw.capture(model, (X,), dynamic=dynamic)
    got = [program(X) for _ in range(3)]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    want = [tuple(t.clone() if isinstance(t, Tensor) else t for t in model(X)) for _ in range(3)]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(got[-1][1:3], want[-1][1:3])
    assert not torch.equal(want[0][0], want[2][0])


def test_copies_share_what_the_originals_shared_and_nothing_with_them() -> None:
    memory = torch.arange(16.0)
    tensors = {"a": memory[2:10].view(2, 4), "b": memory[8:12], "far": memory[12:], "p": nn.Parameter(memory[3:5])}
    own = owned(["a"], tensors)
    assert own.keys() == {"a", "b", "p"} and isinstance(own["p"], nn.Parameter)
    assert all(torch.equal(own[name], tensors[name]) for name in own)
    own["a"].zero_()
    assert own["b"].tolist() == [0, 0, 10, 11] and own["p"].tolist() == [0, 0]
    assert torch.equal(memory, torch.arange(16.0))


def test_a_tensor_without_memory_is_copied_by_itself() -> None:
    meta = torch.ones(3, device="meta")
    own = owned(["m", "e"], {"m": meta, "again": meta, "e": torch.ones(0)})
    assert own["m"].is_meta and own["m"] is own["again"] and own["m"] is not meta and own["e"].shape == (0,)
