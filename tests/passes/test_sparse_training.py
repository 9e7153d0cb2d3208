"""Group sparsity: strengths by the formula, gradients by autograd, and equal shrinking of coupled slices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import DepGraph, depgraph
from graphwright.graph.errors import PreconditionError
from graphwright.passes.criteria import Scoring
from graphwright.passes.sparse_training import group_importance, group_lasso_gradients, shrinkage_strengths


def chain() -> Any:
    """One group: convolution, batch norm, flatten, linear; every parameter away from its initial value."""
    return filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)))


def deep() -> Any:
    """Two groups that share the elements of the middle layer."""
    return filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))


def filled(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.double().eval()


def analysed(model: Any) -> tuple[DepGraph, Scoring]:
    first = next(m for m in model if isinstance(m, (nn.Linear, nn.Conv2d)))
    x = torch.ones(2, 3) if isinstance(first, nn.Linear) else torch.ones(2, 3, 4, 4)
    program = capture(model, (x.double(),))
    return depgraph(program), Scoring(program.tensors())


def test_strengths_follow_the_formula_from_1_to_16() -> None:
    scores = torch.tensor([4.0, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    got = shrinkage_strengths(scores)

    torch.testing.assert_close(got, torch.tensor([1.0, 8.0, 4.0, 2.0, 16.0], dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0, 6.0])
def test_strengths_stay_within_one_and_two_to_the_alpha_and_fall_with_importance(alpha: float) -> None:
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 1e-12
    got = shrinkage_strengths(scores, alpha)

    assert float(got.min()) == 1.0
    assert float(got.max()) == pytest.approx(2**alpha, rel=1e-6)
    falling = got[scores.argsort()].tolist()
    assert all(a >= b for a, b in pairwise(falling))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_strengths_are_all_one_when_all_scores_are_equal(value: float) -> None:
    assert torch.equal(shrinkage_strengths(torch.full((5,), value)), torch.ones(5))


def test_bad_alpha_strength_and_scores_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="alpha must be at least 0, got -1"):
        shrinkage_strengths(torch.ones(3), -1)
    with pytest.raises(ValueError, match="alpha must be at least 0, got nan"):
        shrinkage_strengths(torch.ones(3), float("nan"))
    with pytest.raises(ValueError, match="the scores must be finite"):
        shrinkage_strengths(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="strength must be at least 0, got -0.1"):
        group_lasso_gradients(*analysed(deep()), strength=-0.1)


def test_group_importance_is_the_squared_norm_of_all_coupled_parameters() -> None:
    model = chain()
    graph, scoring = analysed(model)
    conv, norm, _, _, head = model
    want = [
        sum(
            float(part.detach().square().sum())
            for part in (
                *(conv.weight[k], conv.bias[k], norm.weight[k], norm.bias[k]),
                head.weight[:, 4 * k : 4 * k + 4],
            )
        )
        for k in range(6)
    ]
    assert group_importance(graph.groups[0], scoring).tolist() == pytest.approx(want)


def test_gradients_equal_autograd_of_the_penalty_with_the_strengths_held_fixed() -> None:
    model = deep()
    graph, scoring = analysed(model)
    got = group_lasso_gradients(graph, scoring, 1e-2)

    first, second, third = model[0], model[2], model[4]
    penalty = torch.zeros((), dtype=torch.float64)
    for out, into in ((first, second), (second, third)):
        energy = out.weight.square().sum(1) + out.bias.square() + into.weight.square().sum(0)
        penalty = penalty + 1e-2 / 2 * (shrinkage_strengths(energy.detach()) * energy).sum()
    penalty.backward()

    # The output layer's bias is in no group.
    assert set(got) == {n for n, p in model.named_parameters() if p.grad is not None}
    assert "4.bias" not in got
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)
        assert gradient.abs().max() > 0


def test_one_sparse_step_shrinks_all_coupled_slices_by_the_same_factor() -> None:
    model = chain()
    graph, scoring = analysed(model)
    gamma = shrinkage_strengths(group_importance(graph.groups[0], scoring))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    for name, gradient in group_lasso_gradients(graph, scoring, 1e-2).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()

    factor = 1 - 0.5 * 1e-2 * gamma
    assert len(factor.unique()) == 6 and float(factor.min()) == pytest.approx(1 - 0.5 * 1e-2 * 16)
    for name, p in model.named_parameters():
        if name == "4.bias":
            assert torch.equal(p.detach(), before[name])
            continue
        ratio = p.detach() / before[name]
        per_index = factor.repeat_interleave(4).expand(2, 24) if name == "4.weight" else factor
        shape = [-1] + [1] * (ratio.dim() - 1) if name != "4.weight" else [2, 24]
        torch.testing.assert_close(ratio, per_index.reshape(shape).expand_as(ratio))


def test_layers_behind_a_grouped_convolution_are_shrunk_as_any_other() -> None:
    layers = (
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 10, 1),
        nn.Conv2d(10, 2, 1),
    )
    model = filled(nn.Sequential(*layers))
    graph, scoring = analysed(model)
    got = group_lasso_gradients(graph, scoring, 1.0)
    # The last group lies behind the grouped one: what it adds to the last layer is all that this layer gets.
    last = next(g for g in graph.groups if any(m.name == "5.weight" for m in g.members))
    gamma = shrinkage_strengths(group_importance(last, scoring))
    assert last.size == 10 and float(gamma.amax()) == pytest.approx(16) and float(gamma.amin()) == pytest.approx(1)
    torch.testing.assert_close(got["5.weight"], gamma.view(1, 10, 1, 1) * model[5].weight.detach())
    assert {name.partition(".")[0] for name in got} == {"0", "2", "4", "5"}


def test_repeated_steps_separate_the_indices_of_a_group() -> None:
    model = chain()
    graph, scoring = analysed(model)
    spread = group_importance(graph.groups[0], scoring)
    for _ in range(20):
        gradients = group_lasso_gradients(graph, Scoring(scoring.tensors), 1e-2)
        with torch.no_grad():
            for name, gradient in gradients.items():
                model.get_parameter(name).sub_(gradient)
    after = group_importance(graph.groups[0], Scoring(scoring.tensors))

    # The program shares the caller's parameters, so the captured analysis follows the training.
    assert int(after.argmin()) == int(spread.argmin())
    assert float(after.max() / after.min()) > 10 * float(spread.max() / spread.min())


def test_frozen_parameters_get_no_gradient_and_nothing_is_written() -> None:
    model = chain()
    model[0].weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    got = group_lasso_gradients(*analysed(model), strength=1e-2)

    assert "0.weight" not in got and "0.bias" in got
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_tied_parameter_is_listed_once_with_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[1].weight
    got = group_lasso_gradients(*analysed(filled(model)), strength=1e-2)
    assert "1.weight" in got and "2.weight" not in got


def test_only_groups_of_the_given_kinds_are_penalised() -> None:
    graph, scoring = analysed(chain())
    assert set(group_lasso_gradients(graph, scoring, 1e-2, kinds=("channel",))) == {
        *("0.weight", "0.bias", "1.weight", "1.bias", "4.weight")
    }
    assert group_lasso_gradients(graph, scoring, 1e-2, kinds=("head",)) == {}


def test_gradients_have_the_dtype_of_the_parameters() -> None:
    model = deep().half()
    program = capture(model, (torch.ones(2, 3, dtype=torch.float16),))
    got = group_lasso_gradients(depgraph(program), Scoring(program.tensors()), 1e-2)
    assert {g.dtype for g in got.values()} == {torch.float16}


def test_weights_that_are_not_finite_or_absent_are_refused() -> None:
    model = deep()
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(PreconditionError, match="not finite for the group '0:hidden'"):
        group_lasso_gradients(*analysed(model), strength=1e-2)
    with torch.device("meta"):
        meta = capture(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.empty(2, 3),))
    with pytest.raises(PreconditionError, match="meta device"):
        group_lasso_gradients(depgraph(meta), Scoring(meta.tensors()), 1e-2)


def test_a_model_in_training_is_penalised_through_an_analysis_made_in_evaluation_mode() -> None:
    model = chain()
    graph, scoring = analysed(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = model(x).square().mean()
    loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    penalty: dict[str, Tensor] = group_lasso_gradients(graph, scoring, 1e-2)
    for name, gradient in penalty.items():
        model.get_parameter(name).grad += gradient
    optimizer.step()
    for name, p in model.named_parameters():
        want = plain[name] + penalty[name] if name in penalty else plain[name]
        torch.testing.assert_close(p.grad, want)
