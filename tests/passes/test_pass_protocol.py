"""What every registered pass has to keep, whatever it does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.errors import PreconditionError, VerificationError
from graphwright.graph.program import Program
from graphwright.graph.verify import verify
from graphwright.passes import options, registry
from graphwright.passes.base import Context, Pass, PassResult, Pipeline, fingerprint
from graphwright.passes.text import parse, show

# Options with which a pass finds a site in `Sites`; a new pass whose defaults do not gets a line here.
OPTIONS: dict[str, dict[str, Any]] = {
    "learn-layer-cache": {"evaluations": 4, "rounds": 2, "threshold": 0.5},
    "remove-blocks": {"blocks": (0,)},
    "train-weights": {"steps": 2},
}

# A second application of these does it again, since their options are relative to what they are given.
NOT_IDEMPOTENT = {"remove-blocks", "remove-channels", "train-weights"}

# Passes that make a plan of a denoiser; `Sites` is none, and the promises below are kept in other words.
PLANS = frozenset({"insert-feature-cache", "insert-layer-cache", "learn-layer-cache"})

NAMES = sorted(set(registry.BUILTIN) - PLANS)


class Sites(nn.Module):
    """Something to do for each of the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.unused, self.branch, self.head = nn.Linear(3, 2), nn.Linear(8, 8), nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)) * self.frozen
        self.unused(x.mean((2, 3)))
        return self.head(h + self.branch(h))


class Nothing(nn.Module):
    """No site for any pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, Program]:
    model = filled(Sites())
    return model, capture(model, (X,))


@pytest.fixture
def program(captured: tuple[nn.Module, Program]) -> Program:
    return captured[1].copy()


def run(denoise: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
    x = torch.randn(2, 3, generator=generator)
    for time in (4, 3, 2, 1):
        x = x - 0.01 * denoise(x, torch.full((2,), time))
    return x


def context() -> Context:
    return Context(loss=lambda p, x: p(x).square().mean(), batches=[X], training=[X], sample=run)


def text(program: Program) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs} {n.meta.get('val', None) is not None}" for n in program.nodes]


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_the_registered_name_is_the_passs_own_and_it_has_a_docstring(name: str) -> None:
    cls = registry.load(name)
    assert cls.name == name
    assert cls.__doc__
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore


def test_the_table_of_passes_lists_the_registered_ones_with_their_options() -> None:
    text = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    wanted = {n: [f.name for f in dataclasses.fields(registry.load(n))] for n in registry.BUILTIN}
    assert {row[0].strip("`"): re.findall(r"`(\w+)`", row[2]) for row in rows} == wanted


@pytest.mark.parametrize("name", NAMES)
def test_it_applies_and_the_result_verifies_and_runs(name: str, program: Program) -> None:
    result = options.make(name, OPTIONS.get(name, {}))(program, context())

    assert result.modified, f"give {name} options in OPTIONS with which it finds a site, or list it in PLANS"
    assert any(value for value in result.stats.values())
    verify(program)
    assert program(X).shape == (2, 4)


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_IDEMPOTENT))
def test_a_second_application_changes_nothing(name: str, program: Program) -> None:
    step = options.make(name, OPTIONS.get(name, {}))
    step(program, context())
    before = fingerprint(program)

    assert not step(program, context()).modified
    assert fingerprint(program) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_module_and_program_are_unchanged(name: str, captured: tuple[nn.Module, Program]) -> None:
    model, original = captured
    state = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    want, before = original(X), fingerprint(original)
    torch_state = torch.get_rng_state()
    Pipeline([options.make(name, OPTIONS.get(name, {}))])(original, context())

    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert set(now) == set(state) and all(torch.equal(now[n], t) for n, t in state.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert fingerprint(original) == before and torch.equal(original(X), want)
    assert torch.equal(torch.get_rng_state(), torch_state) and torch.is_grad_enabled()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_graph_and_tensors(name: str, captured: tuple[nn.Module, Program]) -> None:
    first, second = (
        Pipeline([options.make(name, OPTIONS.get(name, {}))])(captured[1], context()).output for _ in range(2)
    )
    assert text(first) == text(second)
    a, b = first.tensors(), second.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_a_graph_without_a_site_is_not_modified_or_is_refused(name: str) -> None:
    program = capture(Nothing(), (X,))
    before = fingerprint(program)
    try:
        result = options.make(name, OPTIONS.get(name, {}))(program, context())
    except PreconditionError as err:
        assert "\n" not in str(err) and len(str(err)) > 20
    else:
        assert not result.modified
        assert not any(v for k, v in result.stats.items() if not k.endswith(("_before", "_after")))
    assert fingerprint(program) == before


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_options_survive_text(name: str) -> None:
    step = options.make(name, OPTIONS.get(name, {}))
    assert options.make(name, options.plain(step)) == step
    assert str(step).startswith(name)


class Denoiser(nn.Module):
    """A skip connection that is concatenated, and residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.up = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.branch, self.leave = nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        entered = self.enter(x) * timestep.float().cos()[:, None]
        deep = self.up(self.down(entered).relu())
        deep = deep + self.branch(deep)
        return self.leave(torch.cat([deep, entered], 1))


@pytest.mark.parametrize("name", sorted(PLANS))
def test_a_plan_verifies_is_the_same_again_and_leaves_model_and_program_alone(name: str) -> None:
    model = filled(Denoiser())
    inputs = (torch.randn(2, 3), torch.tensor([3, 4]))
    program = capture(model, inputs)
    state = {n: t.detach().clone() for n, t in model.named_parameters()}
    want, before = program(*inputs), fingerprint(program)
    torch_state = torch.get_rng_state()
    step = options.make(name, OPTIONS.get(name, {}))
    results = [Pipeline([step])(program, context()) for _ in range(2)]

    assert results[0].records[0].result.modified and results[0].records[0].result.stats["macs_refresh"] > 0
    first, second = (result.plan for result in results)
    first.check()
    assert torch.equal(first.module()(*inputs), want)
    for stage in first.stages:
        a, b = first.stages[stage].program, second.stages[stage].program
        assert text(a) == text(b) and all(torch.equal(t, b.tensors()[n]) for n, t in a.tensors().items())
    assert all(torch.equal(t, state[n]) for n, t in model.named_parameters())
    assert fingerprint(program) == before and torch.equal(program(*inputs), want)
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("name", sorted(PLANS))
@pytest.mark.parametrize("second", sorted(registry.BUILTIN))
def test_a_pass_after_a_plan_applies_to_every_stage_or_is_refused(name: str, second: str) -> None:
    program = capture(filled(Denoiser()), (torch.randn(2, 3), torch.tensor([3, 4])))
    steps = [options.make(n, OPTIONS.get(n, {})) for n in (name, second)]
    try:
        result = Pipeline(steps)(program, context())
    except PreconditionError as err:
        assert not steps[1].applies_to_plans
        assert "the passes before it made a plan of " in str(err)
    else:
        assert steps[1].applies_to_plans
        result.plan.check()


# ---------------------------------------------------------------------- what the base class does with a wrong pass


@dataclasses.dataclass(frozen=True)
class Wrong(Pass):
    """A pass that does one thing and says another."""

    name: ClassVar[str] = "wrong"
    act: Callable[[Program], None] = lambda program: None
    modified: bool = False

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        self.act(program)
        return PassResult(self.modified)


def _shrink(program: Program) -> None:
    program.graph_module.head.weight = nn.Parameter(torch.zeros(4, 5))  # type: ignore[union-attr]


def _retarget(program: Program) -> None:
    node = next(n for n in program.nodes if "relu" in str(n.target))
    node.target = torch.ops.aten.sigmoid.default


def test_a_pass_that_hides_a_change_is_caught(program: Program) -> None:
    with pytest.raises(VerificationError, match="wrong changed the program but reported modified=False"):
        Wrong(_retarget)(program)


def test_a_pass_that_leaves_wrong_shapes_is_caught_with_the_node_and_the_module(program: Program) -> None:
    with pytest.raises(VerificationError, match=r"head") as caught:
        Wrong(_shrink, True)(program)
    assert "in head (torch.nn.modules.linear.Linear)" in str(caught.value)
    assert "in forward" in str(caught.value)


def _cycle(program: Program) -> None:
    node = next(n for n in program.nodes if "relu" in str(n.target))
    node.args = (next(iter(reversed(list(program.nodes)))).all_input_nodes[0],)


def test_a_pass_that_leaves_a_malformed_graph_is_caught_with_node_module_and_pass(program: Program) -> None:
    with pytest.raises(VerificationError, match="defined after it") as caught:
        Pipeline([Wrong(_cycle, True)])(program)
    assert "in forward" in str(caught.value) and caught.value.node is not None
    assert "in pass wrong" in caught.value.__notes__[0] and "passes already applied: none" in caught.value.__notes__[0]


def test_a_changed_program_recompiles_and_forgets_its_analyses(program: Program) -> None:
    ctx, calls = Context(), []

    def count(p: Program) -> int:
        calls.append(p.version)
        return len(list(p.nodes))

    assert ctx.analysis(count, program) == ctx.analysis(count, program)
    assert len(calls) == 1
    before = program(X)
    Wrong(_retarget, True)(program, ctx)
    ctx.analysis(count, program)
    assert len(calls) == 2
    assert not torch.allclose(program(X), before)


def test_the_text_of_a_pass_is_what_the_command_line_reads() -> None:
    step = options.make("remove-channels", {"ratio": 0.25, "ignore": ["a", "b c"], "include_bias": True})
    assert str(step) == show(step)
    assert options.make(*parse(str(step))) == step


def test_an_unknown_pass_without_a_near_name_lists_them() -> None:
    with pytest.raises(ValueError, match="unknown pass 'zzz'; known: eliminate-dead-code, "):
        registry.load("zzz")


def test_an_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown pass 'remove-dropuot'; did you mean 'remove-dropout'"):
        registry.load("remove-dropuot")
