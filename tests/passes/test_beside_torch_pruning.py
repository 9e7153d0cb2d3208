"""Beside Torch-Pruning 1.6.1: the same where it does what it says, and what it should do where it does not.

Each test of the second kind first shows that its result is wrong, so that one sees when a release changes that.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.program import Program
from graphwright.passes import criteria
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.criteria import Scoring, layer_sides
from graphwright.passes.fisher import fisher_calibration
from graphwright.passes.importance import importance, scoring_of
from graphwright.passes.remove_channels import RemoveChannels
from graphwright.passes.sparse_training import BatchNormScale, group_lasso_gradients
from graphwright.tools.bench.pruning_models import Crepe

peer: Any = pytest.importorskip("torch_pruning")
warnings.filterwarnings("ignore", module="torch_pruning")


class Net(nn.Module):
    """Two convolutions, the first with a batch norm, and a classifier of flattened features."""

    norm: Any

    def __init__(self, width: int = 16, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(width) if norm else nn.Identity(), nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x))))).flatten(1))


def made(**options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(**options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


X = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def loss(module: Any, x: Tensor) -> Tensor:
    return module(x).square().mean()


def theirs(model: nn.Module, criterion: Any, **options: Any) -> Any:
    """Return their pruner of everything but the classifier."""
    head = options.pop("head", None) or model.head
    kind = options.pop("kind", peer.pruner.BasePruner)
    return kind(model, X[:1], importance=criterion, ignored_layers=[head], **options)


def group_of(model: nn.Module, layer: nn.Module, width: int) -> Any:
    graph = peer.DependencyGraph().build_dependency(model, example_inputs=X[:1])
    return graph.get_pruning_group(layer, peer.prune_conv_out_channels, idxs=list(range(width)))


def ours(program: Program, criterion: str, scoring: Scoring) -> Tensor:
    group = next(g for g in depgraph(program).groups if any(m.name == "conv1.weight" and m.dim == 0 for m in g.members))
    return importance(group, scoring, criterion, "mean", "none")


def width(model: Any) -> int:
    return model.conv1.out_channels


def removed(model: nn.Module, **options: Any) -> int:
    """Return what we leave of the first convolution."""
    program = Pipeline([RemoveChannels(**options)])(capture(model, (X,))).program
    return program.parameters()["conv1.weight"].shape[0]


# ---------------------------------------------------------------------- where both do the same


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        ("MagnitudeImportance", {"criterion": "magnitude-l2"}),
        ("LAMPImportance", {"criterion": "magnitude-l2", "normaliser": "lamp"}),
    ],
)
def test_magnitude_and_lamp_remove_the_same_channels(criterion: str, options: dict[str, Any], scope: str) -> None:
    model = made()
    program = capture(model, (X,))
    result = Pipeline([RemoveChannels(ratio=0.5, scope=scope, **options)])(program)
    pruner = theirs(model, getattr(peer.importance, criterion)(), pruning_ratio=0.5, global_pruning=scope == "global")
    pruner.step()
    tensors = result.program.parameters()
    assert tensors["conv1.weight"].shape[0] < 16 and tensors["conv2.weight"].shape[0] < 12
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(tensors[name].detach(), parameter.detach(), msg=name)


class Pooled(Net):
    """Without a flattened reader, whose columns theirs compares one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x))))).mean((2, 3)))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_fpgm_over_groups_differs_by_the_square_of_the_weights_alone(
    scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def squared(scoring: Scoring, group: Any, members: Any) -> list[Tensor]:
        tensors = {name: t.detach() ** 2 for name, t in scoring.tensors.items()}
        return criteria.CRITERIA["group-fpgm"](replace(scoring, tensors=tensors), group, members)

    monkeypatch.setitem(criteria.CRITERIA, "group-fpgm-squared", squared)
    torch.manual_seed(0)
    model = Pooled().eval()
    program = capture(model, (X,))
    found = {
        criterion: Pipeline([RemoveChannels(ratio=0.5, scope=scope, criterion=criterion)])(program).program.parameters()
        for criterion in ("group-fpgm-squared", "group-fpgm", "fpgm")
    }
    theirs(model, peer.importance.FPGMImportance(), pruning_ratio=0.5, global_pruning=scope == "global").step()

    def same(criterion: str) -> bool:
        pairs = [(found[criterion][name], p) for name, p in model.named_parameters()]
        return all(a.shape == b.shape and torch.equal(a.detach(), b.detach()) for a, b in pairs)

    assert width(model) < 16
    assert same("group-fpgm-squared") and not same("group-fpgm") and not same("fpgm")


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.95])
def test_a_sentinel_is_the_score_of_the_same_rank(fraction: float) -> None:
    model = made(norm=False)
    # Theirs adds 1e-8 to what it divides by.
    theirs = peer.importance.MagnitudeImportance(normalizer=f"sentinel_{fraction}")(group_of(model, model.conv1, 16))
    program = capture(model, (X,))
    group = next(g for g in depgraph(program).groups if g.name == "conv1:channel")
    ours = importance(group, Scoring(program.tensors()), "magnitude-l2", "mean", f"sentinel-{fraction}")
    assert float(ours.sort().values[int(16 * fraction)]) == 1
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)


def fisher_factors(model: Any, scorer: Any) -> tuple[Tensor, Any]:
    """Give their OBDC what it takes from hooks that it does not manage to set, of labels that our calibration draws."""
    calibration = fisher_calibration([X], seed=5)
    for layer in (model.conv1, model.conv2):
        scorer.modules.append(layer)
        layer.register_forward_pre_hook(scorer._save_input)
        layer.register_full_backward_hook(scorer._save_grad_output)
    calibration[0](model, calibration[1][0]).backward()
    scorer.step()
    return scorer.Fisher[model.conv1], calibration


def test_obdc_without_biases_has_the_same_fisher_factors_and_scores() -> None:
    model = made(norm=False)
    model.conv1.bias = model.conv2.bias = None
    scorer = peer.importance.OBDCImportance(normalizer=None, num_classes=5)
    found, (loss, batches, split) = fisher_factors(model, scorer)
    program = capture(model, (X,))
    scoring = scoring_of(program, "obdc", Context(loss=loss, batches=batches, split=split))
    # Theirs is the sum over the four samples of its one batch, ours the mean.
    mean = scoring.squared_gradients["conv1.weight"].flatten(1)
    torch.testing.assert_close(found / 4, mean, rtol=1e-3, atol=1e-5 * float(mean.max()))
    scores = scorer(group_of(model, model.conv1, 16))
    torch.testing.assert_close(ours(program, "obdc", scoring).float(), scores / 4, rtol=1e-3, atol=0)


# ---------------------------------------------------------------------- where theirs is wrong


def test_obdc_takes_layers_with_biases() -> None:
    model = made(norm=False)
    scorer = peer.importance.OBDCImportance(normalizer=None, num_classes=5)
    with pytest.raises(TypeError):
        scorer._prepare_model(model, theirs(model, scorer, pruning_ratio=0.5))
    scorer._clear_buffer()
    _, (loss, batches, split) = fisher_factors(model, scorer)
    with pytest.raises(RuntimeError, match="size of tensor"):
        scorer(group_of(model, model.conv1, 16))
    step = RemoveChannels(criterion="obdc", ratio=0.5, include_bias=True)
    result = Pipeline([step])(capture(made(norm=False), (X,)), Context(loss=loss, batches=batches, split=split))
    assert result.program.parameters()["conv1.weight"].shape[0] == 8


def test_batch_norm_counts_in_taylor_scores() -> None:
    model = made()
    loss(model, X).backward()
    group = group_of(model, model.conv1, 16)
    before = peer.importance.TaylorImportance(normalizer=None)(group)
    names = dict(model.named_parameters())

    def scores() -> Tensor:
        gradients = {name: p.grad.clone() for name, p in names.items() if p.grad is not None}
        return ours(capture(model, (X,)), "taylor", Scoring(dict(model.named_parameters()), gradients))

    first = scores()
    assert model.norm.weight.grad is not None
    model.norm.weight.grad[3] += 1000.0
    assert torch.equal(peer.importance.TaylorImportance(normalizer=None)(group), before)  # it sees nothing of it
    moved = scores() - first
    assert float(moved[3]) > 10 and float(moved.abs().sum() - moved[3].abs()) == 0


def test_a_hessian_score_is_the_mean_over_the_samples() -> None:
    model = made()
    scorer = peer.importance.HessianImportance(normalizer=None)
    squares: dict[str, list[Tensor]] = {}
    for sample in X.split(1):
        model.zero_grad()
        loss(model, sample).backward()
        scorer.accumulate_grad(model)
        for name, p in model.named_parameters():
            assert p.grad is not None
            squares.setdefault(name, []).append(p.grad**2)
    kept = {name: scorer._accu_grad[p] for name, p in model.named_parameters() if p in scorer._accu_grad}
    torch.testing.assert_close(kept["conv1.weight"], squares["conv1.weight"][-1])  # the last sample alone
    found = scoring_of(capture(model, (X,)), "hessian", Context(loss=loss, batches=[X], split=lambda b: b.split(1)))
    for name, each in squares.items():
        torch.testing.assert_close(found.squared_gradients[name], torch.stack(each).mean(0))


def test_distances_between_filters_are_of_the_weights_and_not_of_their_squares() -> None:
    model = made(norm=False)
    with torch.no_grad():
        model.conv1.weight[1] = -model.conv1.weight[0]
    rows = model.conv1.weight.detach().flatten(1).double()
    wanted = torch.cdist(rows, rows).sum(1)
    program = capture(model, (X,))
    torch.testing.assert_close(
        ours(program, "fpgm", Scoring(program.tensors(), {}, {}, {}, *layer_sides(program))), wanted
    )
    group = [(dep, idxs) for dep, idxs in group_of(model, model.conv1, 16)][:1]
    assert group  # the filters that produce the channels
    squared = torch.cdist(rows**2, rows**2).sum(1)
    # Opposite filters, farthest from one another, have one and the same square.
    assert float(squared[0] - squared[1]) == pytest.approx(0, abs=1e-9)
    got = peer.importance.FPGMImportance(normalizer=None, group_reduction="first")(group_of(model, model.conv1, 16))
    torch.testing.assert_close(got.double(), squared, rtol=1e-4, atol=1e-4)


def test_the_largest_ratio_holds_in_one_shot() -> None:
    model = made()
    theirs(model, peer.importance.MagnitudeImportance(), pruning_ratio=0.6, max_pruning_ratio=0.3).step()
    assert width(model) == 6
    assert removed(made(), ratio=0.6, max_ratio=0.3) == 12


def test_a_ratio_given_for_one_layer_is_what_goes_as_everywhere_else() -> None:
    model = made()
    pruner = theirs(model, peer.importance.MagnitudeImportance(), pruning_ratio=0.5)
    pruner.manual_prune_width(model.conv1, peer.prune_conv_out_channels, 0.25)
    assert width(model) == 4  # here its ratio is what stays
    assert removed(made(), ratio=0, ratios={"conv1": 0.25}) == 12


def test_a_width_rounded_to_a_multiple_is_never_zero() -> None:
    model = made()
    theirs(model, peer.importance.MagnitudeImportance(), pruning_ratio=0.7, round_to=8).step()
    assert width(model) == 16  # the kept 4 are rounded to 0, and then nothing goes
    assert removed(made(), ratio=0.7, round_to=8) == 8


def test_isomorphic_classes_always_rank_together() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
            self.last, self.head = nn.Conv2d(16, 4, 3, padding=1), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.conv1, self.conv2, self.conv3, self.last):
                x = torch.relu(layer(x))
            return self.head(x.flatten(1))

    model = Chain().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(model, peer.importance.MagnitudeImportance(), pruning_ratio=0.5, isomorphic=True).step()
    left = sum(layer.weight.shape[0] for layer in (model.conv1, model.conv2, model.conv3))
    assert left != 24  # of 48, without its other switch global_pruning
    program = Pipeline([RemoveChannels(ratio=0.5, scope="isomorphic")])(capture(Chain().eval(), (X,))).program
    found = program.parameters()
    assert sum(found[f"conv{i}.weight"].shape[0] for i in (1, 2, 3)) == 24 and found["last.weight"].shape[0] == 2


def test_equal_scores_give_finite_penalties() -> None:
    model = made(norm=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    loss(model, X).backward()
    pruner = theirs(model, peer.importance.MagnitudeImportance(), kind=peer.pruner.GroupNormPruner, alpha=1)
    pruner.update_regularizer()
    pruner.regularize(model)
    assert model.conv1.weight.grad is not None and bool(model.conv1.weight.grad.isnan().any())
    program = capture(model, (X,))
    gradients = group_lasso_gradients(depgraph(program), Scoring(program.tensors()), 1e-3)
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    torch.testing.assert_close(gradients["conv1.weight"], torch.full((16, 3, 3, 3), 1e-4))


def test_the_exponent_of_the_penalty_is_the_one_asked_for() -> None:
    def pushed(alpha: int) -> Tensor:
        model = made(norm=False)
        loss(model, X).backward()
        before = model.conv1.weight.grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
        pruner = theirs(
            model, peer.importance.MagnitudeImportance(), kind=peer.pruner.GroupNormPruner, alpha=alpha, reg=1e-2
        )
        pruner.update_regularizer()
        pruner.regularize(model)
        return model.conv1.weight.grad - before  # pyright: ignore[reportOptionalOperand]

    torch.testing.assert_close(pushed(1), pushed(4))  # the argument is not read
    program = capture(made(norm=False), (X,))
    graph, scoring = depgraph(program), Scoring(program.tensors())
    flat, steep = (group_lasso_gradients(graph, scoring, 1e-2, alpha)["conv1.weight"] for alpha in (0.0, 4.0))
    ratio = (steep / flat)[:, 0, 0, 0]
    assert float(ratio.min()) == pytest.approx(1, rel=1e-4) and float(ratio.max()) == pytest.approx(16, rel=1e-4)


def test_groups_without_a_batch_norm_are_left_alone_by_its_penalty() -> None:
    model = made()
    loss(model, X).backward()
    pruner = theirs(
        model, peer.importance.BNScaleImportance(), kind=peer.pruner.BNScalePruner, group_lasso=True, reg=1e-3
    )
    pruner.update_regularizer()
    with pytest.raises(Exception):  # noqa: B017 (whatever it raises on the second convolution)
        pruner.regularize(model)
    gradients = BatchNormScale(depgraph(capture(model, (X,))), 1e-3)(dict(model.named_parameters()))
    assert set(gradients) == {"norm.weight"}
    torch.testing.assert_close(gradients["norm.weight"], 1e-3 * model.norm.weight.detach().sign())


def test_columns_of_features_that_were_flattened_after_a_permutation_are_the_right_ones() -> None:
    """The pitch estimator CREPE: its classifier reads ``[position, channel]``, so a channel owns every 64th column."""
    model, frames = Crepe().eval(), torch.randn(2, 1024)
    graph = peer.DependencyGraph().build_dependency(model, example_inputs=frames[:1])
    group = graph.get_pruning_group(model.conv6, peer.prune_conv_out_channels, idxs=[3])
    columns = [idxs for dep, idxs in group if dep.target.module is model.classifier]
    assert columns == [[12, 13, 14, 15]]
    wanted = [3, 67, 131, 195]
    found = [
        member.positions()[3].tolist()
        for g in depgraph(capture(model, (frames,))).groups
        if any(m.name == "conv6.weight" and m.dim == 0 for m in g.members)
        for member in g.members
        if member.name == "classifier.weight"
    ]
    assert found == [wanted]
