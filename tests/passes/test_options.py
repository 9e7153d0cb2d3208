"""Options from plain data: types are those of the dataclass fields, and errors lead to the value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from graphwright.passes import registry
from graphwright.passes.options import OptionError, build, make, options, plain
from graphwright.passes.remove_channels import RemoveChannels


@dataclass(frozen=True)
class Inner:
    size: int
    label: str = "x"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@dataclass(frozen=True)
class Outer:
    flag: bool = False
    ratio: float = 0.5
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    table: Mapping[str, int] = field(default_factory=dict)
    inner: Inner | None = None
    either: bool | Mapping[str, int] = True


def test_every_registered_pass_lists_options_and_takes_its_own_defaults() -> None:
    for name in registry.names():
        cls = registry.load(name)
        required = [o.name for o in options(cls) if o.default is None]
        if not required:
            step = make(name, {})
            assert make(name, plain(step)) == step


def test_plain_data_becomes_the_types_of_the_fields() -> None:
    made = build(Outer, {"ratio": 1, "names": ["a"], "table": {"k": 2}, "inner": {"size": 3}, "either": {"b": 4}}, "it")
    assert made == Outer(ratio=1.0, names=("a",), table={"k": 2}, inner=Inner(3), either={"b": 4})
    assert type(made.ratio) is float
    assert type(made.names) is tuple


@pytest.mark.parametrize(
    ("values", "message", "path"),
    [
        ({"flag": 1}, "flag must be true or false, got 1", ("flag",)),
        ({"flag": "yes"}, "flag must be true or false, got the text 'yes'", ("flag",)),
        ({"ratio": "0.5"}, "ratio must be a number, got the text '0.5'", ("ratio",)),
        ({"ratio": True}, "ratio must be a number, got true", ("ratio",)),
        ({"ratio": None}, "ratio must be a number, got nothing", ("ratio",)),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'", ("kind",)),
        ({"names": "a"}, "names must be a list of text, got the text 'a'", ("names",)),
        ({"names": ["a", 2]}, r"names\[1\] must be text, got 2", ("names", 1)),
        ({"table": {"k": "v"}}, "table.k must be a whole number", ("table", "k")),
        ({"inner": {"size": 0}}, "size must be at least 1, got 0", ("inner", "size")),
        ({"inner": {"sise": 1}}, "inner has no option 'sise'; did you mean 'size'?", ("inner", "sise")),
        ({"inner": {}}, "inner needs the option 'size' .a whole number.", ("inner",)),
        ({"either": {"b": 1.5}}, "either.b must be a whole number", ("either", "b")),
        ({"ratoi": 1}, "it has no option 'ratoi'; did you mean 'ratio'?", ("ratoi",)),
        ([], "it takes a mapping of options", ()),
    ],
)
def test_a_wrong_value_is_named_with_its_path(values: Any, message: str, path: tuple[str | int, ...]) -> None:
    with pytest.raises(OptionError, match=message.replace("?", r"\?")) as caught:
        build(Outer, values, "it")
    assert caught.value.path == path


def test_what_a_pass_refuses_is_traced_to_the_option() -> None:
    with pytest.raises(OptionError, match=r"ratio must be in \[0, 1\), got 2.0") as caught:
        make("remove-channels", {"scope": "local", "ratio": 2})
    assert caught.value.path == ("ratio",)


def test_an_unknown_pass_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match="did you mean 'remove-channels'"):
        make("remove-chanels", {})


def test_defaults_are_listed_as_text() -> None:
    listed = {o.name: o for o in options(RemoveChannels)}
    assert (listed["ratio"].type, listed["ratio"].default) == ("a number", "0.5")
    assert (listed["ignore"].type, listed["ignore"].default) == ("a list of text", "[]")
    assert listed["ratios"].type == "a mapping of text to numbers"
    assert listed["min_width"].about == "No group gets narrower than this."
    assert all(option.about for option in listed.values())


def test_what_a_docstring_says_of_an_option_is_joined_to_one_line() -> None:
    @dataclass
    class Told:
        """Something.

        Attributes:
            first: One line
                and another.
            second: Short: with a colon.

        Note:
            third: Not an attribute.
        """

        first: int = 1
        second: int = 2
        third: int = 3

    assert [option.about for option in options(Told)] == ["One line and another.", "Short: with a colon.", ""]
