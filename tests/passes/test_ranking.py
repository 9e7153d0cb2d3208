"""Ranking: widths within scopes, legal widths, and which indices stay."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.groups import CouplingGroup
from graphwright.passes.ranking import ROUNDINGS, Limits, global_widths, legal_width, local_widths, select


def group(size: int, name: str = "a:channel", step: int = 1, blocks: int = 1) -> CouplingGroup:
    """A group of which only the numbers matter."""
    template = _TEMPLATE
    return CouplingGroup(name, "channel", size, template.members, "exact", (), (), step, blocks, template.axis)


(_TEMPLATE,) = depgraph(capture(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.ones(2, 3),))).groups


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    size=st.integers(1, 70),
    step=st.sampled_from([1, 1, 2, 4]),
    wanted=st.floats(0, 1),
    max_ratio=st.floats(0, 1),
    min_width=st.integers(1, 20),
    round_to=st.sampled_from([1, 2, 3, 8, 16]),
)
def test_legal_widths_respect_every_limit_and_are_never_zero(
    size: int, step: int, wanted: float, max_ratio: float, min_width: int, round_to: int
) -> None:
    limits = Limits(max_ratio, min_width, round_to)
    got = legal_width(group(size, step=step), wanted * size, size, limits)

    assert 1 <= got <= size
    assert (size - got) % step == 0
    assert got >= min(min_width, size)
    assert size - got <= max_ratio * size + 1e-6
    assert got % round_to == 0 or got == size
    allowed = [w for w in range(1, size + 1) if (size - w) % step == 0 and w >= min_width]
    allowed = [w for w in allowed if size - w <= max_ratio * size + 1e-9 and w % round_to == 0]
    if allowed:
        assert abs(got - wanted * size) == min(abs(w - wanted * size) for w in allowed)


@pytest.mark.parametrize(
    ("size", "wanted", "round_to", "kept"),
    [
        pytest.param(16, 1.6, 8, 8, id="ratio_0.9_of_16_keeps_8_and_not_0"),
        pytest.param(64, 29, 8, 32, id="the_nearest_multiple_may_be_above"),
        pytest.param(64, 35, 8, 32, id="the_nearest_multiple_may_be_below"),
        pytest.param(64, 28, 8, 32, id="between_two_multiples_the_wider"),
        pytest.param(6, 3, 8, 6, id="a_group_narrower_than_the_multiple_stays_whole"),
        pytest.param(12, 6, 8, 8, id="a_width_that_is_no_multiple_shrinks_to_one"),
    ],
)
def test_round_to_keeps_the_nearest_multiple(size: int, wanted: float, round_to: int, kept: int) -> None:
    assert legal_width(group(size), wanted, size, Limits(round_to=round_to)) == kept


@pytest.mark.parametrize(
    ("size", "step", "ratio", "nearest", "floor_removed", "floor_kept"),
    [
        (128, 32, 0.3, 96, 96, 64),
        (256, 32, 0.3, 192, 192, 160),
        (512, 32, 0.3, 352, 384, 352),  # whole numbers of channels of each group of a norm
        (256, 1, 0.3, 179, 179, 179),
        (512, 1, 0.3, 358, 358, 358),
        (128, 32, 0.2, 96, 128, 96),
    ],
)
def test_what_a_norm_does_not_allow_is_rounded_as_asked(
    size: int, step: int, ratio: float, nearest: int, floor_removed: int, floor_kept: int
) -> None:
    wanted = size * (1 - ratio)
    got = [legal_width(group(size, step=step), wanted, size, Limits(rounding=rounding)) for rounding in ROUNDINGS]
    assert got == [nearest, floor_removed, floor_kept]


def test_max_ratio_is_measured_on_the_initial_width() -> None:
    # 20 at the beginning, 12 now: at most half may go, which is 10.
    assert legal_width(group(12), 1, 20, Limits(max_ratio=0.5)) == 10


def test_local_widths_are_fractions_of_the_initial_widths() -> None:
    groups = [group(8, "a"), group(12, "b")]
    got = local_widths(groups, {"a": 0.4, "b": 0.25}, {"a": 10, "b": 16})
    assert got == {"a": pytest.approx(6.0), "b": pytest.approx(12.0)}


def test_global_widths_remove_the_lowest_scores_of_all_groups_together() -> None:
    groups = [group(4, "a"), group(4, "b")]
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([2.5, 5.0, 6.0, 7.0])}
    got = global_widths(groups, scores, {"a": 0.5, "b": 0.5}, {"a": 4, "b": 4})
    assert got == {"a": 1, "b": 3}


def test_global_ranking_with_equal_scores_removes_exactly_the_wanted_number() -> None:
    groups = [group(8, "a"), group(8, "b")]
    scores = {"a": torch.ones(8), "b": torch.ones(8)}
    got = global_widths(groups, scores, {"a": 0.25, "b": 0.25}, {"a": 8, "b": 8})
    assert sum(got.values()) == 12


def test_global_ranking_counts_what_earlier_steps_removed() -> None:
    groups = [group(6, "a"), group(7, "b")]
    scores = {"a": torch.arange(6.0), "b": torch.arange(7.0) + 10}
    # Of 16 initial indices a half is to go: 3 are gone, 5 more go.
    got = global_widths(groups, scores, {"a": 0.5, "b": 0.5}, {"a": 8, "b": 8})
    assert got == {"a": 1, "b": 7}
    # A quarter is to go, and that many are gone.
    assert global_widths(groups, scores, {"a": 0.1, "b": 0.1}, {"a": 8, "b": 8}) == {"a": 6, "b": 7}


def test_what_must_stay_does_not_compete_so_that_others_go_in_its_place() -> None:
    groups = [group(4, "a"), group(4, "b")]
    scores = {"a": torch.zeros(4), "b": torch.ones(4)}
    ratios, initial = {"a": 0.5, "b": 0.5}, {"a": 4, "b": 4}
    assert global_widths(groups, scores, ratios, initial) == {"a": 1, "b": 3}
    assert global_widths(groups, scores, ratios, initial, Limits(max_ratio=0.5)) == {"a": 2, "b": 2}
    assert global_widths(groups, scores, ratios, initial, Limits(min_width=3)) == {"a": 3, "b": 3}


def test_groups_with_different_ratios_compete_apart() -> None:
    groups = [group(4, "a"), group(4, "b")]
    scores = {"a": torch.zeros(4), "b": torch.ones(4)}
    assert global_widths(groups, scores, {"a": 0.25, "b": 0.5}, {"a": 4, "b": 4}) == {"a": 3, "b": 2}


def test_select_keeps_the_highest_scores_in_order_and_breaks_ties_by_position() -> None:
    assert select(group(5), torch.tensor([0.1, 3.0, 0.2, 3.0, 1.0]), 3) == [1, 3, 4]
    assert select(group(6), torch.ones(6), 2) == [0, 1]


def test_select_takes_equally_many_from_every_block() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 0.4, 0.3, 0.2, 0.1])
    assert select(group(8, blocks=2), scores, 4) == [0, 1, 4, 5]
    # A width that the blocks do not divide cannot be shared out.
    assert select(group(8, blocks=2), scores, 3) == [0, 1, 2]
