"""An oracle for feature caches: the eager model with a kept tensor put into its concatenations.

It does not look at the graph: it watches the calls of `torch.cat` that the model's decoder blocks make, keeps their first
operand at one evaluation and puts it in its place at another one, with another sample and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import graphwright as gw
from graphwright.graph.joins import skip_joins
from graphwright.passes.base import Context
from graphwright.passes.insert_feature_cache import REGISTER, InsertFeatureCache
from graphwright.tools.zoo import ZOO
from graphwright.tools.zoo.entry import case, tensors

Inputs = dict[str, Any]
# Both sides run the same kernels on the same shapes: 0.0 is measured everywhere. In units of outputs of about 1.
EQUAL = 1e-6


@dataclass
class Layout:
    """A model, its inputs by batch size, the number of its skip connections, and the blocks that concatenate them.

    The batch varies by default; a capture in which nothing does (``dynamic={}``) takes a quarter of the time.
    """

    model: nn.Module
    inputs: Callable[[int], Inputs]
    skips: int
    decoder: Callable[[str], bool] = lambda name: name.startswith("up_blocks.") and name.count(".") == 1
    dynamic: Any = None
    program: gw.Program = field(init=False)
    concatenations: int = 0

    def __post_init__(self) -> None:
        # The weights are drawn anew: the last convolutions and the modulations of many of these models start at zero.
        self.model = case(self.model, self.inputs, seed=3).model
        self.program = gw.capture(self.model, (), self.inputs(2), self.dynamic)
        self.concatenations = len(eager(self, self.inputs(2))[1])


def skips_of(config: Any) -> int:
    """One for the first convolution, one for each layer of the encoder, one for each of its downsamplers.

    Without a middle block there is nothing beyond the last of them: it is concatenated with itself.
    """
    blocks, nothing = len(config.down_block_types), config.get("mid_block_type", "a class of its own") is None
    return 1 + config.layers_per_block * blocks + blocks - 1 - nothing


def from_zoo(name: str, skips: int | None = None) -> Layout:
    entry: Any = ZOO[name].build()

    def alone(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() else value

    def inputs(b: int) -> Inputs:
        if b == 3:
            return entry.second[1]
        return entry.kwargs if b == 2 else pytree.tree_map(alone, entry.kwargs)

    return Layout(entry.model, inputs, skips or skips_of(entry.model.config), dynamic=entry.dynamic)


class Watch(TorchFunctionMode):
    """Watches the concatenations that modules of a decoder make: keeps what enters them, or puts something there."""

    def __init__(self, inside: Callable[[], bool], put: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.inside, self.put, self.seen = inside, put, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and len(args[0]) == 2 and self.inside():
            main, skip = args[0]
            self.seen.append(main.clone())
            main = self.put.get(len(self.seen) - 1, main)
            return func((main, skip), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def modules_entered(layout: Layout) -> Iterator[list[str]]:
    """Give a list that holds the names of the decoder's modules, and of those inside of them, whose forward runs."""
    stack, hooks = list[str](), list[Any]()

    def left(*_: Any) -> None:
        stack.pop()

    roots = tuple(name for name, _ in layout.model.named_modules() if layout.decoder(name))
    for name, module in layout.model.named_modules():
        if not name.startswith(roots):
            continue
        hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(left))
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def first(value: Any) -> Tensor:
    return tensors(value)[0]


def eager(layout: Layout, inputs: Inputs, put: Mapping[int, Tensor] = {}) -> tuple[Tensor, list[Tensor]]:
    """Return the model's result, and what entered the decoder's concatenations, the shallowest (last) first.

    ``put`` says by branch what is to enter there instead.
    """
    last = layout.concatenations - 1
    with torch.no_grad(), modules_entered(layout) as stack:
        watch = Watch(
            lambda: bool(stack) and layout.decoder(stack[-1]), {last - branch: value for branch, value in put.items()}
        )
        with watch:
            out = layout.model(**inputs)
    return first(out), watch.seen[::-1]


def run(program: gw.Program, inputs: Inputs, **registers: Tensor) -> Any:
    with torch.no_grad():
        return program(**inputs, **registers)


def later(inputs: Inputs) -> Inputs:
    """Return the inputs of another step of a run: another sample, time and residuals, the same condition."""

    def moved(value: Tensor) -> Tensor:
        return value.flip(-1) * 0.7 + 0.3

    changed = {name: moved(inputs[name]) for name in ("sample", "hidden_states") if name in inputs}
    changed |= {name: inputs[name] + 300 for name in ("timestep",) if name in inputs}
    changed |= {name: pytree.tree_map(moved, value) for name, value in inputs.items() if "residual" in name}
    return inputs | changed


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


Plans = list[tuple[gw.Program, gw.Program, Mapping[str, float]]]


def plans_of(layout: Layout) -> Plans:
    """Return the refresh and the reuse program of every branch, with the statistics of the pass."""
    results: list[Any] = [
        InsertFeatureCache(branch=i).rewrite(layout.program.copy(), Context()) for i in range(layout.skips)
    ]
    results[layout.skips // 2].output.check()  # of one branch, as it takes longer than all the rest
    return [(r.output.stages["refresh"].program, r.output.stages["reuse"].program, r.stats) for r in results]


class Checks:
    """What holds for every layout. A test module gives the fixtures ``layout`` and ``plans``."""

    def test_every_skip_connection_is_found(self, layout: Layout) -> None:
        joins = skip_joins(layout.program)
        _, entered = eager(layout, layout.inputs(2))
        assert len(joins) == layout.skips <= layout.concatenations <= layout.skips + 1
        shapes = [tuple(v.shape[1:]) for v in entered[: layout.skips]]
        assert [tuple(join.main.meta["val"].shape[1:]) for join in joins] == shapes
        assert all(join.cut is join.main for join in joins)

    def test_every_branch_equals_the_model_with_a_kept_tensor(self, layout: Layout, plans: Plans) -> None:
        before, now = layout.inputs(2), later(layout.inputs(2))
        old, kept = eager(layout, before)
        new, _ = eager(layout, now)
        assert float(new.abs().max()) > 0.1 and apart(old, new) > 0.1
        for branch, (refresh, reuse, _) in enumerate(plans):
            out, fresh = run(refresh, now)
            torch.testing.assert_close(first(out), new, rtol=0, atol=EQUAL)
            torch.testing.assert_close(first(run(reuse, now, **fresh)), new, rtol=0, atol=EQUAL)
            _, stale = run(refresh, before)
            assert stale[REGISTER].shape == kept[branch].shape
            held = stale[REGISTER].clone()
            want, _ = eager(layout, now, {branch: kept[branch]})
            for _ in range(2):  # the second time finds the register as it was
                torch.testing.assert_close(first(run(reuse, now, **stale)), want, rtol=0, atol=EQUAL)
            assert torch.equal(stale[REGISTER], held)
            assert apart(want, new) > 1e-3 and apart(want, old) > 1e-3

    def test_what_lies_beyond_the_cut_is_gone(self, layout: Layout, plans: Plans) -> None:
        full = len(layout.program.parameters())
        sizes = [(len(reuse.parameters()), stats["nodes_reuse"], stats["macs_reuse"]) for _, reuse, stats in plans]
        assert all(a[1:] < b[1:] and a[0] <= b[0] for a, b in zip(sizes, sizes[1:], strict=False))
        assert sizes[-1][0] < full and all(stats["nodes_reuse"] < stats["nodes_refresh"] for *_, stats in plans)
        _, reuse, stats = plans[0]
        assert stats["macs_reuse"] < 0.6 * stats["macs_refresh"]
        inputs = layout.inputs(2)
        _, written = run(plans[0][0], inputs)
        want = first(run(reuse, inputs, **written))
        own = {id(p) for p in reuse.parameters().values()}
        others = {p: p.detach().clone() for p in layout.model.parameters() if id(p) not in own}
        assert others
        with torch.no_grad():
            for p in others:
                p.fill_(float("nan"))
            got = first(run(reuse, inputs, **written))
            for p, value in others.items():
                p.copy_(value)
        assert torch.equal(got, want)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_another_batch(self, layout: Layout, plans: Plans, batch: int) -> None:
        before = layout.inputs(batch)
        now = later(before)
        branch = layout.skips // 2
        refresh, reuse, _ = plans[branch]
        if layout.dynamic == {}:
            with pytest.raises(gw.InputError, match="to let it vary"):
                run(refresh, before)
            return
        new, kept = eager(layout, before)
        out, stale = run(refresh, before)
        torch.testing.assert_close(first(out), new, rtol=0, atol=EQUAL)
        want, _ = eager(layout, now, {branch: kept[branch]})
        assert want.shape[0] == batch
        torch.testing.assert_close(first(run(reuse, now, **stale)), want, rtol=0, atol=EQUAL)
