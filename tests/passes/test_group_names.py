"""Groups keep their names over steps, passes and files, also when others of the same layer reach width 1.

The oracle is the weights: what the composed record cuts from the caller's own tensors is what the program holds, and
what it says of a group is what it says of the columns that read the group.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import PreconditionError
from graphwright.graph.program import Program
from graphwright.graph.resize import RemovalRecord, TensorCut, resize
from graphwright.graph.serialize import load_program, save_program
from graphwright.passes.base import Pipeline
from graphwright.passes.remove_channels import RemoveChannels

NARROW, WIDE = "a:hidden", "a:hidden.2"


class Split(nn.Module):
    """One layer whose first ``narrow`` features go one way, the others another."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.sizes = [narrow, wide]
        self.a, self.b, self.c = nn.Linear(5, narrow + wide), nn.Linear(narrow, 3), nn.Linear(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.a(x).split(self.sizes, 1)
        return self.b(u) + self.c(v)


class Factors(nn.Module):
    """One layer whose features are ``narrow`` times ``wide``; each factor is contracted with a parameter."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.sizes = [narrow, wide]
        self.a, self.c = nn.Linear(5, narrow * wide), nn.Linear(wide, 3)
        self.b = nn.Parameter(torch.randn(narrow))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bio,i->bo", self.c(self.a(x).unflatten(-1, self.sizes)), self.b)


def program(kind: type[nn.Module], narrow: int = 2, wide: int = 12, strong: int | None = None) -> Program:
    torch.manual_seed(0)
    model = kind(narrow, wide).eval()
    if strong is not None:  # this feature stays, whatever else goes
        model.get_parameter("a.weight").data[strong] *= 100
    return capture(model, (torch.randn(4, 5),))


def check(before: Program, after: Program, record: RemovalRecord) -> None:
    for name, tensor in before.tensors().items():
        assert torch.equal(record.apply(name, tensor), after.tensors()[name]), name
    columns = record.tensors["c.weight"][1]
    assert record.groups[WIDE] == columns
    assert 1 < len(columns.kept) < columns.of == 12


@pytest.mark.parametrize("kind", [Split, Factors])
@pytest.mark.parametrize("strong", [None, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_steps_remove_from_the_group_they_planned_for(kind: type[nn.Module], strong: int | None, steps: int) -> None:
    before = program(kind, strong=strong)
    assert [g.name for g in depgraph(before).groups] == [NARROW, WIDE]
    done = Pipeline([RemoveChannels(ratio=0.6, steps=steps)])(before)

    assert {n: len(cut.kept) for n, cut in done.removal.groups.items()} == {NARROW: 1, WIDE: 5}
    check(before, done.output, done.removal)
    # The narrow group is none any more; the other one did not take its name.
    assert [g.name for g in depgraph(done.output).groups] == [WIDE]


@pytest.mark.parametrize("kind", [Split, Factors])
def test_passes_after_one_another_compose(kind: type[nn.Module]) -> None:
    before = program(kind)
    done = Pipeline([RemoveChannels(ratio=0.5), RemoveChannels(ratio=0.5, ratios={NARROW: 0.9})])(before)
    assert {n: len(cut.kept) for n, cut in done.removal.groups.items()} == {NARROW: 1, WIDE: 3}
    check(before, done.output, done.removal)


def test_names_are_kept_in_files(tmp_path: Path) -> None:
    before = program(Split)
    work = before.copy()
    first = resize(work, {NARROW: [1], WIDE: range(2, 12)})
    save_program(work, tmp_path)
    again = load_program(tmp_path)
    assert [g.name for g in depgraph(again).groups] == [WIDE]
    second = resize(again, {WIDE: [0, 3, 4]})
    check(before, again, first.then(second))
    assert first.then(second).groups[WIDE].kept == (2, 5, 6)


def test_a_program_that_lost_nothing_is_not_changed() -> None:
    before = program(Split)
    resize(before.copy(), {NARROW: [1]})
    assert before.group_names == ()
    assert [g.name for g in depgraph(before).groups] == [NARROW, WIDE]


def test_records_that_did_not_follow_one_another_are_refused() -> None:
    first = RemovalRecord({WIDE: TensorCut((0, 3), 12)}, {"c.weight": {1: TensorCut((0, 3), 12)}})
    with pytest.raises(
        PreconditionError, match="left 2 indices of dimension 1 of 'c.weight', the second was made for 12"
    ):
        first.then(first)
    with pytest.raises(PreconditionError, match="left 2 indices of group"):
        RemovalRecord(first.groups).then(RemovalRecord(first.groups))


def test_options_may_name_a_group_that_an_earlier_pass_took_to_width_1_but_no_other() -> None:
    torch.manual_seed(0)
    sole = capture(
        nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.ones(4, 5),)
    )
    names = [g.name for g in depgraph(sole).groups]
    narrow = RemoveChannels(ratio=0.0, ratios={names[0]: 0.9}, round_to=1)
    done = Pipeline([narrow, RemoveChannels(ratio=0.5, ignore=(names[0],))])(sole)
    assert {n: len(cut.kept) for n, cut in done.removal.groups.items()} == {names[0]: 1, names[1]: 3}
    with pytest.raises(PreconditionError, match="nothing of Sequential matches '0:hiden'"):
        Pipeline([narrow, RemoveChannels(ratio=0.5, ignore=("0:hiden",))])(sole)


def test_the_name_of_a_group_is_not_that_of_a_second_one_of_the_same_layer() -> None:
    before = program(Split)
    done = Pipeline([RemoveChannels(ratio=0.5, ignore=(NARROW,))])(before)
    assert {n: len(cut.kept) for n, cut in done.removal.groups.items()} == {WIDE: 6}
