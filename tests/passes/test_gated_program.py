"""Gates: 1 and 0 give the programs of the layer cache, and the gradient is that of finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphwright as gw
from graphwright.passes.gated_program import gated_program
from graphwright.passes.insert_layer_cache import InsertLayerCache
from graphwright.tools.zoo import ZOO

ONES = (1.0, 1.0, 1.0, 1.0)


def first(value: Any) -> Tensor:
    return next(v for v in pytree.tree_leaves(value) if isinstance(v, Tensor))


@pytest.fixture(scope="module")
def dit() -> Any:
    """Two blocks in float64, so that differences are those of the algebra; kept branches of another input."""
    case = ZOO["dit"].build()
    model = case.model.double()
    kwargs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, case.kwargs)
    program = gw.capture(model, (), kwargs, case.dynamic)
    programs = gated_program(program)
    earlier = {**kwargs, "timestep": kwargs["timestep"] + 100, "hidden_states": kwargs["hidden_states"] * 1.3}
    with torch.no_grad():
        _, kept = programs.full(**earlier)
    return program, programs, kwargs, kept


def test_open_gates_give_the_model_whatever_was_kept(dit) -> None:
    program, programs, kwargs, kept = dit
    with torch.no_grad():
        want = first(program(**kwargs))
        got = first(programs.gated(**kwargs, **kept, gate=torch.tensor(ONES, dtype=torch.float64)))
        full = first(programs.full(**kwargs)[0])
    assert torch.equal(got, want) and torch.equal(full, want)
    assert float(want.abs().mean()) > 1e-2


@pytest.mark.parametrize("computed", [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 1, 1), (1, 1, 1, 0)])
def test_gates_of_0_and_1_give_the_reuse_program(dit, computed: tuple[int, ...]) -> None:
    program, programs, kwargs, kept = dit
    taken = tuple(i for i, on in enumerate(computed) if not on)
    plan = gw.Pipeline([InsertLayerCache(reuse=((), taken))])(program).plan
    stage = plan.stages["reuse_0"]
    with torch.no_grad():
        want = first(stage.program(**kwargs, **{register: kept[register] for register in stage.reads}))
        got = first(programs.gated(**kwargs, **kept, gate=torch.tensor(computed, dtype=torch.float64)))
        model = first(program(**kwargs))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert float((want - model).abs().max()) > 1e-4  # the kept branches are others


def test_the_gradient_of_each_logit_is_that_of_finite_differences(dit) -> None:
    program, programs, kwargs, kept = dit
    with torch.no_grad():
        teacher = first(program(**kwargs))

    def loss(logits: Tensor) -> Tensor:
        got = first(programs.gated(**kwargs, **kept, gate=logits.sigmoid()))
        return (got - teacher).square().mean() + 1e-3 * logits.sigmoid().sum()

    logits = torch.tensor([0.3, -1.2, 2.0, -0.4], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(loss(logits), logits)[0]
    step = 1e-5
    with torch.no_grad():
        want = torch.stack([(loss(logits + step * e) - loss(logits - step * e)) / (2 * step) for e in torch.eye(4)])
    # A central difference in float64: rounding 1e-16 / 1e-5, truncation 1e-10.
    torch.testing.assert_close(gradient, want.double(), rtol=1e-6, atol=1e-9)
    penalty = 1e-3 * (logits.sigmoid() * (1 - logits.sigmoid())).detach()
    assert bool(((gradient - penalty).abs() > 1e-8).all())  # the difference itself depends on every gate


def test_parameters_share_the_memory_and_take_no_gradient(dit) -> None:
    program, programs, kwargs, kept = dit
    gates = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    first(programs.gated(**kwargs, **kept, gate=gates)).sum().backward()
    assert gates.grad is not None
    for name, parameter in program.parameters().items():
        assert parameter.requires_grad and parameter.grad is None
        handle = programs.gated.parameters()[name]
        assert handle.data_ptr() == parameter.data_ptr() and not handle.requires_grad and handle.grad is None


def test_half_precision_mixes_in_float32_and_is_exact_at_both_ends() -> None:
    case = ZOO["dit"].build()
    model = case.model.bfloat16()
    kwargs = pytree.tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, case.kwargs)
    programs = gated_program(gw.capture(model, (), kwargs, case.dynamic))
    with torch.no_grad():
        want, kept = programs.full(**kwargs)
        open_ = first(programs.gated(**kwargs, **{k: -v for k, v in kept.items()}, gate=programs.open_gates))
        shut = first(programs.gated(**kwargs, **kept, gate=torch.zeros(4)))
    assert programs.open_gates.dtype is torch.float32
    assert torch.equal(open_, first(want)) and torch.equal(shut, first(want))


def test_a_network_without_branches_is_refused() -> None:
    program = gw.capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(gw.PreconditionError, match="Linear has no residual branches"):
        gated_program(program)
