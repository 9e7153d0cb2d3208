"""The text form of passes: what is printed is read back, and what is wrong is shown where."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.passes.base import Context, Pass, PassResult
from graphwright.passes.options import make
from graphwright.passes.remove_channels import RemoveChannels
from graphwright.passes.text import OptionError, parse, show, show_value

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Anything(Pass):
    """A pass that takes whatever it is given."""

    name: ClassVar[str] = "anything"

    value: object = 7
    more: tuple[str, ...] = field(default=())

    def rewrite(self, program: object, ctx: Context) -> PassResult:
        raise NotImplementedError


@given(VALUES)
def test_a_value_is_read_back_as_it_was(value: object) -> None:
    name, options = parse(f"anything{{value={show_value(value)}}}")
    assert name == "anything"
    assert options == {"value": value}


@pytest.mark.parametrize(
    "text", ["a-b", "1e-4", "true", "None", "x y", "a,b", "", "1.5.2", "'", '"', "\\", "*.weight", "a\nb"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse(show(Anything(value=text)))[1] == {"value": text}


def test_only_options_that_differ_from_their_defaults_are_shown() -> None:
    assert show(RemoveChannels()) == "remove-channels"
    assert show(RemoveChannels(ratio=0.25, scope="global")) == "remove-channels{ratio=0.25, scope=global}"


@pytest.mark.parametrize(
    "step",
    [
        RemoveChannels(),
        RemoveChannels(ratio=0.3, criterion="taylor", ignore=("*.lm_head*", "conv_in:channel")),
        RemoveChannels(ratios={"a.b:head-dim": 0.5, 'odd "name"': 1e-05}, steps=3, include_bias=True),
    ],
)
def test_a_pass_is_read_back_from_its_text(step: Pass) -> None:
    assert make(*parse(show(step))) == step
    # The form that pipelines put into records and error notes is read as well.
    assert make(*parse(str(step))) == step


class Halves:
    def __call__(self, scores: object) -> object:
        return scores

    def half(self, scores: object) -> object:
        return scores


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (show_value, "graphwright.passes.text:show_value"),
        (partial(show_value, 3), "graphwright.passes.text:show_value"),
        (Halves(), f"{__name__}:Halves"),
        (Halves().half, f"{__name__}:Halves.half"),
    ],
)
def test_a_function_is_shown_by_its_name_and_read_back_as_text(function: object, name: str) -> None:
    assert parse(show(Anything(value=function))) == ("anything", {"value": name})


def test_spaces_and_a_trailing_comma_mean_nothing() -> None:
    assert parse(" a { x = 1 , y = [ 1, 2, ] , } ") == ("a", {"x": 1, "y": [1, 2]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the name of a pass at position 1"),
        ("a{", "found the end"),
        ("a{x}", "expected '='"),
        ("a{x=}", "a value at position 5"),
        ("a{x=1", "',' or '}'"),
        ("a{x=[1}", "found '}'"),
        ("a{x='b}", "a closing '"),
        ("a} ", "the end at position 2"),
        ("a{x=1,x=2}", "'x' is given twice"),
    ],
)
def test_malformed_text_is_refused_where_it_breaks(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("'", ".")):
        parse(text)
