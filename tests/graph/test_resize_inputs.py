"""What `resize` and a program refuse: indices that are none, an analysis of an earlier program, calls without weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import InputError, PreconditionError
from graphwright.graph.interface import InputSpec
from graphwright.graph.oracle import masked_outputs
from graphwright.graph.program import Program
from graphwright.graph.resize import resize

WIDTH = 8
KEEP = [1, 2, 6]
GROUP = "0:hidden"


def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)).eval(), (torch.randn(4, 5),))


def mask() -> Tensor:
    return torch.isin(torch.arange(WIDTH), torch.tensor(KEEP))


@pytest.mark.parametrize(
    "given",
    [
        KEEP,
        tuple(KEEP),
        np.array(KEEP),
        torch.tensor(KEEP),
        torch.tensor(KEEP, dtype=torch.int16),
        mask(),
        mask().tolist(),
    ],
    ids=str,
)
def test_indices_or_truth_values_say_what_stays(given: Any) -> None:
    small, whole = program(), program()
    record = resize(small, {GROUP: given})
    assert record.groups[GROUP].kept == tuple(KEEP)
    assert torch.equal(small.tensors()["0.weight"], whole.tensors()["0.weight"][KEEP])


@pytest.mark.parametrize(
    "given",
    [
        *([0.5, 1.7], ["a"], [[0, 1]], [[0], [1, 2]], None, 3, torch.tensor(3), torch.tensor([0.0, 1.0])),
        *(torch.tensor([False, True]), [True] * (WIDTH + 1), "01", torch.tensor([0.5], dtype=torch.bfloat16)),
    ],
    ids=str,
)
def test_anything_else_is_refused_and_changes_nothing(given: Any) -> None:
    work = program()
    with pytest.raises(PreconditionError, match="must be a list of whole numbers from 0 to 7, or 8 truth values"):
        resize(work, {GROUP: given})
    assert work.version == 0 and work.tensors()["0.weight"].shape[0] == WIDTH


@pytest.mark.parametrize("given", [[], torch.zeros(WIDTH, dtype=torch.bool)], ids=["no index", "no truth"])
def test_nothing_cannot_stay(given: Any) -> None:
    with pytest.raises(PreconditionError, match="would keep no index"):
        resize(program(), {GROUP: given})


def test_an_analysis_of_the_program_before_a_removal_is_refused() -> None:
    work = program()
    graph = depgraph(work)
    resize(work, {GROUP: range(4)}, graph)
    with pytest.raises(PreconditionError, match="before its last rewrite; call depgraph"):
        resize(work, {GROUP: [0, 1]}, graph)
    with pytest.raises(PreconditionError, match="before its last rewrite"):
        masked_outputs(graph, {GROUP: [0, 1]}, [torch.randn(4, 5)])
    assert work.tensors()["0.weight"].shape[0] == 4
    record = resize(work, {GROUP: [0, 1]}, depgraph(work))
    assert record.tensors["1.weight"][1].of == 4


def test_a_program_without_weights_says_that_it_has_none() -> None:
    with torch.device("meta"):
        weightless = capture(nn.Linear(5, 3).eval(), (torch.randn(4, 5),))
    with pytest.raises(PreconditionError, match=r"'weight' is on the meta device.*capture the model with its weights"):
        weightless(torch.randn(4, 5))
    assert weightless(torch.randn(4, 5, device="meta")).shape == (4, 3)


def test_a_constant_that_is_no_number_is_the_same_as_itself() -> None:
    spec = InputSpec("scale", constant=float("nan"))
    spec.check(float("-nan"))
    for other in (0.0, None, "nan"):
        with pytest.raises(InputError, match="captured as the constant nan"):
            spec.check(other)
