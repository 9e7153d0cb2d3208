"""The law that every operator rule obeys, checked on one operator at a time.

Removing indices from an operator's inputs, the way its rule says they correspond, and running it with the resized
literals gives what the original operator gives, with the corresponding indices removed from the output. The operands
here are placeholders with axes of their own, so that only the rule under test ties them; the expected result comes
from running the operator itself. Three kinds of axes are special:

- an axis contracted with a weight: removal equals masking the weight to zero there;
- an axis in ``Analysis.sums``: removal equals the operator on operands of which any one is zero there;
- an axis in ``Analysis.labels``: a statistic runs over it, so only shapes are compared when it shrinks.

An operand that is an ``nn.Parameter`` stands for a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node, map_arg

from graphwright.graph.axes import Axis, leaves
from graphwright.graph.rules import Analysis, Resizer, rule_for

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One call of an operator, and what its rule should say of each operand's dimensions.

    Attributes:
        target: The operator overload.
        args: Its arguments, with tensors in place.
        expect: Per tensor operand, in order of appearance, one letter a dimension: ``f`` free, ``s`` free and
            summed over, ``l`` free and labelled, ``p`` part of it is free, ``!`` frozen, ``?`` not said. Dimensions
            of size 1 are always frozen and not compared. Empty: nothing is said.
        out: The same for the output tensors.
        mask_all: Removal equals masking only if every weight is masked at every removed index.
        random: The operator draws random numbers; only shapes are compared.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    expect: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    mask_all: bool = False
    random: bool = False


def call(target: Any, *args: Any, expect: str = "", out: Any = "", **options: Any) -> Call:
    """Make a `Call`; words are separated by spaces; ``options`` are the operator's by name, or `Call`'s own."""
    own = {k: options.pop(k) for k in ("mask_all", "random") if k in options}
    return Call(target, args, options, tuple(expect.split()), tuple(out.split()), **own)


class Draw:
    """Draws the arguments of a call."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._generator = torch.Generator().manual_seed(0)
        self._next = 1

    def int(self, low: int, high: int) -> int:
        """Draw an integer of ``low`` to ``high``, both included."""
        return self._data.draw(st.integers(low, high))

    def pick(self, *values: Any) -> Any:
        """Draw one of ``values``."""
        return self._data.draw(st.sampled_from(values))

    def flag(self) -> bool:
        """Draw a truth value."""
        return self._data.draw(st.booleans())

    def size(self, *, one: bool = True) -> int:
        """Draw a dimension's size, 1 sometimes."""
        return self.pick(*((3, 2, 4, 6, 1) if one else (3, 2, 4, 6)))

    def shape(self, low: int, high: int | None = None, *, one: bool = True) -> list[int]:
        """Draw a shape of rank ``low`` to ``high``."""
        return [self.size(one=one) for _ in range(self.int(low, low if high is None else high))]

    def dim(self, rank: int) -> int:
        """Draw a dimension, negative half of the time."""
        return self.int(-rank, rank - 1)

    def permutation(self, n: int) -> list[int]:
        """Draw an order of ``n`` things."""
        return self._data.draw(st.permutations(range(n)))

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return normal random numbers."""
        return torch.randn(shape, dtype=dtype, generator=self._generator)

    def weight(self, *shape: int) -> nn.Parameter:
        """Return normal random numbers that stand for a weight."""
        return nn.Parameter(self.tensor(*shape))

    def ids(self, *shape: int) -> Tensor:
        """Return numbers of which none occurs twice in the call."""
        n = math.prod(shape)
        self._next += n
        return torch.arange(self._next - n, self._next, dtype=torch.float64).reshape(shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return random integers below ``high``."""
        return torch.randint(0, high, shape, generator=self._generator)

    def booleans(self, *shape: int) -> Tensor:
        """Return random truth values."""
        return torch.rand(shape, generator=self._generator) < 0.5

    def stretched(self, shape: Sequence[int]) -> list[int]:
        """Draw a shape that broadcasts to ``shape``: some sizes are 1, some leading dimensions are missing."""
        out = [size if self.int(0, 3) else 1 for size in shape]
        return out[self.int(0, len(out)) if self.int(0, 3) == 0 else 0 :]


@dataclass
class Case:
    """A named family of calls. ``names`` are the operators, without overload, that it covers."""

    names: tuple[str, ...]
    make: Callable[[Draw], Call]
    exact: bool = False

    def __str__(self) -> str:
        return getattr(self.make, "__name__", "") or "/".join(self.names)


@dataclass
class Table:
    """The cases of one test file."""

    cases: list[Case] = field(default_factory=list)
    exact: bool = False

    def __call__(
        self, names: str, exact: bool | None = None
    ) -> Callable[[Callable[[Draw], Call]], Callable[[Draw], Call]]:
        """Register the decorated function, which draws a call, for the operators in ``names``."""

        def register(make: Callable[[Draw], Call]) -> Callable[[Draw], Call]:
            self.cases.append(Case(tuple(names.split()), make, self.exact if exact is None else exact))
            return make

        return register

    def parameters(self) -> list[Any]:
        """Return what ``pytest.mark.parametrize`` takes."""
        import pytest

        return [pytest.param(case, id=str(case)) for case in self.cases]


def name_of(target: Any) -> str:
    """Return an operator's name without overload and without the underscore of in-place forms."""
    name = target._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def check_case(case: Case, share: float = 1) -> None:
    """Check the law on random calls of ``case``, ``share`` of the profile's number, and that it was put to the test."""
    seen: set[str] = set()
    tally = {"removed": 0, "free": 0}

    def law(data: st.DataObject) -> None:
        made = case.make(Draw(data))
        seen.add(name_of(made.target))
        if data.draw(st.integers(0, 3)) == 0:
            made = by_name(made)
        tally["removed"] += check_law(made, data.draw(st.integers(0, 2**16)), exact=case.exact)
        tally["free"] += bool({"f", "s", "p"} & set("".join((*made.expect, *made.out))))

    count = max(1, round(share * settings().max_examples))
    settings(max_examples=count)(given(st.data())(law))()
    for again in range(20):  # until each of the declared operators was drawn
        if seen != set(case.names):
            seed(again)(settings(max_examples=count)(given(st.data())(law)))()
    assert seen == set(case.names), f"{case} drew {sorted(seen)}, declares {sorted(case.names)}"
    assert tally["removed"] or not tally["free"], f"{case}: no index was ever removed"


def by_name(made: Call) -> Call:
    """Return the same call with everything after the first argument given by name."""
    schema = made.target._schema.arguments
    named = {a.name: v for a, v in zip(schema[1:], made.args[1:], strict=False)}
    return Call(made.target, made.args[:1], {**named, **made.kwargs}, made.expect, made.out, made.mask_all, made.random)


# ---------------------------------------------------------------------- the law


class Bound:
    """A call as a graph node over placeholders, analysed by its rule."""

    def __init__(self, made: Call) -> None:
        graph, self.analysis = Graph(), Analysis()
        self.operands: dict[Node, Tensor] = {}
        placed: dict[int, Node] = {}

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in placed:
                node = graph.placeholder(f"x{len(placed)}")
                node.meta["val"] = value
                placed[id(value)] = node
                self.operands[node] = value
                self.analysis.dims[node] = self.analysis.fresh(value)
                if isinstance(value, nn.Parameter):
                    self.analysis.weights.add(node)
                    self.analysis.parameters.add(node)
            return placed[id(value)]

        args, kwargs = pytree.tree_map(place, (list(made.args), made.kwargs))
        self.node = graph.call_function(made.target, tuple(args), kwargs)
        self.before = self.run(self.operands)
        self.node.meta["val"] = self.before
        self.analysis.node = self.node
        rule = rule_for(made.target)
        assert rule is not None, f"{made.target} has no rule"
        self.rule = rule
        self.analysis.dims[self.node] = rule.axes(self.analysis, self.node)

    def run(self, operands: dict[Node, Tensor]) -> Any:
        """Run the operator, as it now stands in the graph, on copies of ``operands``."""
        copies = {node: value.detach().clone() for node, value in operands.items()}
        args, kwargs = map_arg((self.node.args, self.node.kwargs), lambda n: copies[n])
        with torch.no_grad():
            return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def outputs(self) -> list[tuple[tuple[Axis, ...], Tensor]]:
        """Return dims and value of every output tensor."""
        return list(_pairs(self.analysis.dims[self.node], self.before))

    def free(self) -> dict[Axis, None]:
        """Return the leaves that are not frozen."""
        dims = [*(self.analysis.of(n) for n in self.operands), *(dims for dims, _ in self.outputs())]
        return {leaf: None for d in dims for axis in d for leaf in leaves(axis) if leaf.frozen is None}

    def marked(self, marks: Sequence[Any]) -> set[Axis]:
        """Return the leaves of labels or sums."""
        return {leaf for mark in marks for leaf in leaves(mark.axis)}


def _pairs(dims: Any, value: Any) -> Iterator[tuple[tuple[Axis, ...], Tensor]]:
    if isinstance(value, Tensor):
        assert isinstance(dims, tuple), f"no dims for an output of shape {tuple(value.shape)}"
        yield dims, value
    elif isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
        assert len(dims) == len(value)
        for d, v in zip(dims, value, strict=True):
            yield from _pairs(d, v)


def check_law(made: Call, number: int, exact: bool = False) -> int:
    """Check one call, with the indices that the random ``number`` picks.

    Returns:
        How many indices were removed in the comparison of values.
    """
    bound = Bound(made)
    for dims, value in bound.outputs():
        assert tuple(axis.size for axis in dims) == tuple(value.shape), (
            f"axes {dims} for an output {tuple(value.shape)}"
        )
    _check_expected(bound, made)
    rng = np.random.default_rng(number)
    statistic = bound.marked(bound.analysis.labels)
    removed = _compare(bound, made, _choose(bound, rng, exclude=statistic), rng, exact, values=not made.random)
    if statistic & bound.free().keys():
        again = Bound(made)
        _compare(again, made, _choose(again, rng, exclude=set()), rng, exact, values=False)
    return removed


def _check_expected(bound: Bound, made: Call) -> None:
    labels, sums = bound.marked(bound.analysis.labels), bound.marked(bound.analysis.sums)
    sides = [
        ("operand", made.expect, [bound.analysis.of(n) for n in bound.operands]),
        ("output", made.out, [d for d, _ in bound.outputs()]),
    ]
    for side, words, operands in sides:
        if not words:
            continue
        words = [*words, *[""] * (len(operands) - len(words))]  # trailing operands without dimensions need no word
        for number, (word, dims) in enumerate(zip(words, operands, strict=True)):
            word = "" if word == "-" else word
            assert len(word) == len(dims), f"{side} {number} of {made.target}: {word!r} for {len(dims)} dimensions"
            for d, (letter, axis) in enumerate(zip(word, dims, strict=True)):
                found = [leaf for leaf in leaves(axis) if leaf.size != 1]
                if not found or letter == "?":
                    continue
                free = [leaf.frozen is None for leaf in found]
                holds = {
                    "!": not any(free),
                    "p": any(free),
                    "f": all(free) and not any(leaf in labels or leaf in sums for leaf in found),
                    "s": all(free) and all(leaf in sums for leaf in found),
                    "l": all(free) and all(leaf in labels for leaf in found),
                }[letter]
                assert holds, f"{side} {number} of {made.target}, dimension {d} should be {letter!r}: {axis}"


def _choose(bound: Bound, rng: np.random.Generator, exclude: set[Axis]) -> dict[Axis, np.ndarray]:
    keep: dict[Axis, np.ndarray] = {}
    candidates = [leaf for leaf in bound.free() if leaf not in exclude and leaf.size > 1]
    for leaf in candidates:
        if rng.random() < 0.2 and len(candidates) > 1:
            continue
        for _ in range(20):
            count = int(rng.integers(1, leaf.size))
            kept = np.sort(rng.choice(leaf.size, count, replace=False))
            rz = Resizer(bound.analysis, {**keep, leaf: kept})
            if all(rz.size(c.axis) % c.groups == 0 for c in bound.analysis.constraints):
                keep[leaf] = kept
                break
    return keep


def _compare(
    bound: Bound, made: Call, keep: dict[Axis, np.ndarray], rng: np.random.Generator, exact: bool, values: bool
) -> int:
    rz = Resizer(bound.analysis, keep)
    outputs = bound.outputs()
    masked = _mask(bound, made, keep, rng)
    expected = [_cut(rz, dims, value) for dims, value in _pairs(bound.analysis.dims[bound.node], bound.run(masked))]
    cut = {node: _cut(rz, bound.analysis.of(node), value) for node, value in masked.items()}
    literals = str(bound.node.args)
    if bound.rule.resize is not None:
        bound.rule.resize(rz, bound.node)
    what = f"{made.target} {literals} -> {bound.node.target} {bound.node.args}, keeping {keep}"
    actual = [value for _, value in _pairs(bound.analysis.dims[bound.node], bound.run(cut))]
    assert len(actual) == len(expected) == len(outputs)
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
        assert got.dtype == want.dtype, what
        if values:
            tolerance = 0.0 if exact else 1e-9  # float64; the order of a sum may change, its length is below 1000
            torch.testing.assert_close(
                got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}\n{m}"
            )
    return sum(leaf.size - len(kept) for leaf, kept in keep.items())


def _mask(bound: Bound, made: Call, keep: dict[Axis, np.ndarray], rng: np.random.Generator) -> dict[Node, Tensor]:
    """Zero what removal equals masking of: see the module's docstring."""
    masked = {node: value.detach().clone() for node, value in bound.operands.items()}
    shown = {leaf for dims, _ in bound.outputs() for axis in dims for leaf in leaves(axis)}
    summed = bound.marked(bound.analysis.sums)
    for leaf, kept in keep.items():
        holders = [n for n in bound.operands if any(leaf in set(leaves(a)) for a in bound.analysis.of(n))]
        weights = [n for n in holders if n in bound.analysis.weights]
        chosen = weights if made.mask_all or leaf not in shown else []
        if leaf in summed:
            chosen = [*chosen, holders[rng.integers(len(holders))]]
        alone = Resizer(bound.analysis, {leaf: kept})
        for node in chosen:
            for d, axis in enumerate(bound.analysis.of(node)):
                if (stays := alone.kept(axis)) is not None:
                    gone = np.setdiff1d(np.arange(axis.size), stays)
                    masked[node].index_fill_(d, torch.from_numpy(gone), 0)
    return masked


def _cut(rz: Resizer, dims: Sequence[Axis], value: Tensor) -> Tensor:
    for d, axis in enumerate(dims):
        if (kept := rz.kept(axis)) is not None:
            value = value.index_select(d, torch.as_tensor(kept))
    return value
