"""Schedules against the vectors of the published code, and their JSON form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graphwright.graph.errors import PreconditionError
from graphwright.graph.schedules import Listed, Schedule, Uniform, alternating, at, centred, decode, masked, step_mask

# evaluations, interval, center, power: what the released code of DeepCache computes, and what equation 7 says with the
# power of a negative distance signed.
VECTORS = {
    (50, 5, 15, 1.4): ("0 5 9 13 17 21 26 31 37 43", "0 5 10 13 15 19 24 29 35 42"),
    (50, 5, 10, 1.5): ("0 4 7 10 14 19 24 30 36 43", "0 4 8 10 12 16 21 27 34 41"),
    (50, 3, 15, 1.3): (
        "0 3 6 8 11 13 15 17 20 23 26 29 32 35 39 42 46",
        "0 3 6 9 11 13 15 16 19 21 24 27 31 34 38 42 45",
    ),
    (50, 6, 15, 1.3): ("0 6 10 15 19 24 30 36 43", "0 5 11 14 18 23 28 35 42"),
    (250, 20, 120, 1.4): (
        "0 22 42 61 80 98 115 131 149 168 187 207 228",
        "0 25 49 71 90 106 118 125 138 156 176 199 223",
    ),
    (50, 5, 0, 1.4): ("0 1 5 9 13 18 24 30 36 43", "0 1 5 9 13 18 24 30 36 43"),
}


def full(schedule: Schedule, evaluations: int) -> list[int]:
    return [i for i, name in enumerate(schedule.programs(evaluations)) if name == "refresh"]


@pytest.mark.parametrize("mode", ["reference", "paper"])
@pytest.mark.parametrize("arguments", VECTORS)
def test_centred_schedules_are_those_of_the_paper_and_of_its_code(arguments, mode: str) -> None:
    reference, paper = VECTORS[arguments]
    want = paper if mode == "paper" else reference
    evaluations, interval, center, power = arguments
    assert full(centred(evaluations, interval, center, power, mode), evaluations) == list(map(int, want.split()))


@pytest.mark.parametrize("mode", ["reference", "paper"])
def test_points_that_fall_together_do_not_cost_full_evaluations(mode: str) -> None:
    assert len(full(centred(50, 2, 15, 1.5, mode), 50)) == 25


def test_uniform_counts_evaluations_or_steps() -> None:
    assert full(Uniform(3), 10) == [0, 3, 6, 9]
    assert full(Uniform(1), 3) == [0, 1, 2]
    assert full(Uniform(2), 19) == list(range(0, 19, 2))
    assert full(Uniform(2, per_step=2), 9) == [0, 1, 4, 5, 8]


def test_masks_and_places() -> None:
    assert (
        masked("1001")
        == at([3, 0], 4)
        == masked([True, False, False, 1])
        == Listed(("refresh", "reuse", "reuse", "refresh"))
    )


@pytest.mark.parametrize(
    ("speed", "full"),
    [
        ("slow", [0, 1, 3, 5, 7, 9, 11, 13, 15]),
        ("medium", [0, 1, 4, 7, 10, 13]),
        ("fast", [0, 1, 5, 9, 13]),
        ("ultra", [0, 1, 7, 13]),
    ],
)
def test_step_masks_are_full_at_first_and_sparser_the_faster(speed: str, full: list[int]) -> None:
    assert step_mask(16, speed) == at(full, 16)
    assert step_mask(1, speed) == at([0], 1)


@pytest.mark.parametrize(
    ("arguments", "cheap"),
    [
        ((6,), (1, 3, 5)),
        ((7,), (1, 3, 5)),
        ((1,), ()),
        ((8, 2), (2, 4, 6)),
        # A last step of one evaluation, as of Heun's solver: it is the first of its step.
        ((9, 2), (2, 4, 6, 8)),
        ((8, 2, False), (1, 3, 5, 7)),
        ((9, 2, False), (1, 3, 5, 7)),
    ],
)
def test_alternating_evaluations_begin_with_a_full_one(arguments: tuple[Any, ...], cheap: tuple[int, ...]) -> None:
    assert alternating(*arguments) == cheap


def test_shifted_solvers_of_two_evaluations_have_as_many_cheap_ones_as_published() -> None:
    assert (len(alternating(50, 2)), len(alternating(20, 2))) == (24, 9)
    assert (len(alternating(50)), len(alternating(50, 2, shifted=False))) == (25, 25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masked("0110"), "evaluation 0 must be a full one"),
        (lambda: masked("12"), "a mask has a 1 for a full evaluation and a 0 for a reuse, got '12'"),
        (lambda: masked(""), "evaluation 0 must be a full one"),
        (lambda: at([0, 9], 9), "evaluation 9 is beyond a run of 9"),
        (lambda: Uniform(0), "interval and per_step must be 1 or more"),
        (lambda: Listed(()), "one evaluation or more"),
        (lambda: centred(50, 5, 60, 1.4), "0 <= center < 50"),
        (lambda: centred(50, 5, 15, 1.0), "power above 1"),
        (lambda: centred(50, 5, 15, 1.4, "exact"), "a mode of paper, reference"),
        (lambda: masked("100").programs(4), "runs of 3 evaluations, got 4"),
        (lambda: masked("100").program(3), "and this run goes on"),
        (lambda: alternating(0), "a run of 1 or more"),
        (lambda: alternating(9, 3), "1 or 2 a step, got 9 and 3"),
        (lambda: step_mask(9, "quick"), "a speed of slow, medium, fast, ultra, got 9, 'quick'"),
        (lambda: step_mask(0), "a run of 1 or more"),
        (lambda: decode({"kind": "random"}), "kind 'random' is not known; known: uniform, listed"),
    ],
)
def test_schedules_that_cannot_be_are_refused(make, message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        make()


@pytest.mark.parametrize("schedule", [Uniform(3), Uniform(2, 2), masked("1101"), centred(20, 4, 5, 1.3)])
def test_the_json_form_gives_the_schedule_back(schedule: Schedule) -> None:
    assert decode(json.loads(json.dumps(schedule.encode()))) == schedule
