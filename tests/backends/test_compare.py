"""Check inputs stay valid, and differences are seen."""

import math

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.compare import (
    default_tolerance,
    dynamic_sizes,
    example_like,
    inputs_at_other_sizes,
    other_sizes,
    relative_difference,
)
from graphwright.frontends.capture import capture
from graphwright.graph.errors import ExportError


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, ids: Tensor, mask: Tensor, bias: Tensor, steps: Tensor, keep: bool = True) -> Tensor:
        x = self.table(ids) * mask.unsqueeze(-1) + steps[:, None, None]
        return x.masked_fill(bias.isinf().unsqueeze(-1), 0.0)


IDS = torch.tensor([[7, 30, 12, 44], [9, 8, 41, 25]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
BIAS = torch.tensor([[0.0, -math.inf, 0.0, 0.0], [0.0, 0.0, 0.0, -math.inf]])
STEPS = torch.tensor([1.0, 999.0])


def mixed_program():
    dims = {0: "batch", 1: "tokens"}
    return capture(
        Mixed(),
        (IDS, MASK, BIAS, STEPS),
        {"keep": True},
        {"ids": dims, "mask": dims, "bias": dims, "steps": {0: "batch"}},
    )


def test_values_stay_in_the_examples_range_and_masks_keep_their_pattern() -> None:
    program = mixed_program()
    ids, mask, bias, steps, keep = example_like(program, {"batch": 3, "tokens": 8}, seed=3)
    assert keep is True
    assert (ids.shape, mask.shape, bias.shape, steps.shape) == ((3, 8), (3, 8), (3, 8), (3,))
    assert ids.min() >= 7 and ids.max() <= 44 and len(ids.unique()) > 8
    assert steps.min() >= 1 and steps.max() <= 999 and len(steps.unique()) >= 2
    assert torch.equal(mask[2], torch.cat([MASK[0], MASK[0]]))
    assert torch.equal(bias[1], torch.cat([BIAS[1], BIAS[1]]))


def test_same_seed_gives_the_same_values_and_another_seed_others() -> None:
    program = mixed_program()
    first, again, other = (example_like(program, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(example_like(program)[0], IDS)


def test_example_is_not_changed_or_shared() -> None:
    program = mixed_program()
    example_like(program)[0].zero_()
    assert torch.equal(program.example[0], IDS)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names \['token'\]; the dynamic dimensions are \['batch', 'tokens'\]"):
        example_like(mixed_program(), {"token": 3})


def test_other_sizes_change_every_dimension() -> None:
    program = mixed_program()
    assert dynamic_sizes(program) == {"batch": 2, "tokens": 4}
    candidates = list(other_sizes(program))
    assert candidates[0] == {"batch": 3, "tokens": 8}
    assert {"batch": 3, "tokens": 2} in candidates
    assert all(c["batch"] != 2 and c["tokens"] != 4 for c in candidates)


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


def test_difference_is_relative_to_the_largest_magnitude() -> None:
    want = torch.tensor([0.0, -200.0, 3.0])
    assert relative_difference([want], [want + torch.tensor([0.0, 0.0, 1.0])]) == [pytest.approx(1 / 200)]
    tiny = want * 1e-20
    assert relative_difference([tiny], [tiny * 1.5])[0] == pytest.approx(0.5, rel=1e-6)


def test_output_of_zeros_is_measured_against_the_others() -> None:
    zeros, big = torch.zeros(3), torch.full((3,), 10.0)
    assert relative_difference([zeros, big], [zeros + 0.1, big]) == [pytest.approx(0.01), 0.0]


@pytest.mark.parametrize(
    ("want", "got"),
    [
        (torch.ones(3), torch.ones(3, 1)),
        (torch.ones(3), torch.ones(3, dtype=torch.float64)),
        (torch.ones(2), torch.tensor([1.0, math.nan])),
        (torch.tensor([math.nan]), torch.tensor([1.0])),
        (torch.tensor([math.inf]), torch.tensor([-math.inf])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
    ],
)
def test_what_is_not_a_matter_of_rounding_is_infinite(want: Tensor, got: Tensor) -> None:
    assert relative_difference([want], [got]) == [math.inf]


def test_equal_infinities_and_nans_are_no_difference() -> None:
    value = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert relative_difference([value], [value.clone()]) == [0.0]


def test_missing_output_is_refused() -> None:
    with pytest.raises(ExportError, match="returns 1 tensors, the program 2"):
        relative_difference([torch.ones(1)] * 2, [torch.ones(1)])


def test_tolerance_follows_from_the_coarsest_dtype() -> None:
    assert default_tolerance(capture(nn.Linear(4, 3), (torch.randn(2, 4),))) == 1e-4
    assert default_tolerance(capture(nn.Linear(4, 3).half(), (torch.randn(2, 4).half(),))) == 2e-2
