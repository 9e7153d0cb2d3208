"""Check inputs stay valid, and differences are seen, by one rule for every comparison."""

import math

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.compare import (
    absolute_difference,
    dynamic_sizes,
    example_like,
    magnitude,
    other_sizes,
    relative_difference,
    tolerance_for,
)


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


def test_difference_is_relative_to_the_largest_magnitude() -> None:
    want = torch.tensor([0.0, -200.0, 3.0])
    assert relative_difference([want + torch.tensor([0.0, 0.0, 1.0])], [want]) == [pytest.approx(1 / 200)]
    tiny = want * 1e-20
    assert relative_difference([tiny * 1.5], [tiny])[0] == pytest.approx(0.5, rel=1e-6)


def test_output_of_zeros_is_measured_against_the_others() -> None:
    zeros, big = torch.zeros(3), torch.full((3,), 10.0)
    assert relative_difference([zeros + 0.1, big], [zeros, big]) == [pytest.approx(0.01), 0.0]


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
    assert relative_difference([got], [want]) == [math.inf]


def test_equal_infinities_and_nans_are_no_difference() -> None:
    value = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert relative_difference([value.clone()], [value]) == [0.0]


def test_outputs_of_nothing_but_zeros_are_compared_absolutely() -> None:
    zeros = torch.zeros(3)
    assert relative_difference([zeros + 0.25, zeros], [zeros, zeros]) == [0.25, 0.0]
    # A whole number lends no magnitude to what is not one.
    assert relative_difference([zeros + 0.25, torch.tensor([8])], [zeros, torch.tensor([8])]) == [0.25, 0.0]


def test_another_number_of_outputs_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="zip"):
        relative_difference([torch.ones(1)], [torch.ones(1)] * 2)


def test_absolute_difference_has_no_scale() -> None:
    want = torch.tensor([200.0, math.nan])
    assert absolute_difference(torch.tensor([199.5, math.nan]), want) == 0.5
    assert absolute_difference(torch.tensor([3]), torch.tensor([5])) == math.inf


@pytest.mark.parametrize(
    ("tensor", "largest"),
    [
        (torch.tensor([1.0, -3.0, math.inf, math.nan]), 3.0),
        (torch.tensor([math.nan]), 0.0),
        (torch.tensor([]), 0.0),
        (torch.tensor([3 + 4j]), 5.0),
        (torch.tensor([-7, 2]), 7.0),
        (torch.tensor([False, True]), 1.0),
    ],
)
def test_magnitude_is_that_of_the_largest_finite_value(tensor: Tensor, largest: float) -> None:
    assert magnitude(tensor) == largest


def test_tolerance_grows_with_what_differs_and_with_the_coarseness_of_the_type() -> None:
    assert [tolerance_for(torch.float32, b) for b in ("rounding", "masking", "runtime")] == [1e-5, 2e-4, 1e-4]
    for between in ("rounding", "masking", "runtime"):
        types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        limits = [tolerance_for(dtype, between) for dtype in types]
        assert limits == sorted(limits) and all(
            limit > torch.finfo(t).eps for limit, t in zip(limits, types, strict=True)
        )
        assert tolerance_for(torch.complex64, between) == tolerance_for(torch.float32, between)
        assert tolerance_for(torch.int64, between) == tolerance_for(torch.bool, between) == 0.0
