"""Exports are compared at another size too, and what is too far off is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.compare import Check, compare, default_tolerance, inputs_at_other_sizes
from graphwright.frontends.capture import capture
from graphwright.graph.errors import ExportError


class Positions(nn.Module):
    """Has eight positions; more tokens are out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions(torch.arange(x.shape[1]))


def test_model_with_a_longest_sequence_is_checked_at_a_shorter_one() -> None:
    program = capture(Positions(), (torch.randn(2, 8, 4),), dynamic={"x": {0: "batch", 1: "tokens"}})
    inputs, outputs = inputs_at_other_sizes(program, None, 0)
    assert inputs[0].shape == outputs[0].shape == (3, 4, 4)


def test_program_that_runs_at_no_other_size_is_refused() -> None:
    program = capture(Positions(), (torch.randn(2, 8, 4),), dynamic={"x": {0: "batch", 1: "tokens"}})
    with pytest.raises(
        ExportError, match=r"does not run itself at another size \(tried batch=2, tokens=9\): index out"
    ):
        inputs_at_other_sizes(program, {"batch": 2, "tokens": 9}, 0)


CHECK = Check("example inputs", (), (torch.tensor([0.0, -200.0]), torch.tensor([1, 2])))


def test_a_check_reports_every_output() -> None:
    actual = [torch.tensor([0.5, -200.0]), torch.tensor([1, 2])]
    assert compare("the export", ["a", "b"], CHECK, actual, 0.01) == {
        "inputs": "example inputs",
        "differences": {"a": 0.0025, "b": 0.0},
        "max_difference": 0.0025,
    }


@pytest.mark.parametrize(
    ("actual", "what"),
    [
        (
            [torch.tensor([4.0, -200.0]), torch.tensor([1, 2])],
            "output 'a' on the example inputs has a relative difference of 0.02",
        ),
        (
            [torch.tensor([0.0, -200.0]), torch.tensor([1, 3])],
            "output 'b' on the example inputs has another shape, dtype, integer or infinity",
        ),
        (
            [torch.tensor([0.0, math.nan]), torch.tensor([1, 2])],
            "output 'a' on the example inputs has another shape, dtype, integer or infinity",
        ),
    ],
)
def test_what_is_too_far_off_is_refused(actual: list[Tensor], what: str) -> None:
    with pytest.raises(ExportError) as caught:
        compare("the export of Net", ["a", "b"], CHECK, actual, 0.01)
    start = "the export of Net does not compute what the program computes"
    assert str(caught.value) == f"{start}: {what}, at most 0.01 is accepted; nothing was written"


def test_missing_output_is_refused() -> None:
    with pytest.raises(ExportError, match="returns 1 tensors, the program 2"):
        compare("the export", ["a", "b"], CHECK, [torch.ones(1)], 0.01)


def test_tolerance_follows_from_the_coarsest_dtype() -> None:
    assert default_tolerance(capture(nn.Linear(4, 3), (torch.randn(2, 4),))) == 1e-4
    assert default_tolerance(capture(nn.Linear(4, 3).half(), (torch.randn(2, 4).half(),))) == 2e-2
    assert default_tolerance(capture(nn.Linear(4, 3).double(), (torch.randn(2, 4).double(),))) == 1e-4
