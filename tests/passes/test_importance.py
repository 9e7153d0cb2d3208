"""Criteria, reductions and normalisers against references written with plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import PreconditionError
from graphwright.graph.program import Program
from graphwright.graph.resize import resize
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.criteria import CRITERIA, Scoring
from graphwright.passes.importance import NotScoredError, importance, is_bias, scoring_of
from graphwright.passes.options import OptionError, make, plain
from graphwright.passes.reductions import NORMALISERS, REDUCTIONS, normaliser_of
from graphwright.passes.remove_channels import RemoveChannels
from graphwright.passes.text import parse
from graphwright.tools.recipe_schema import Recipe

WIDTH, CELLS = 5, 4


class Flattened(nn.Module):
    """Convolution, batch norm, flatten, linear: the linear layer holds four columns for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH * CELLS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def made(cls: Callable[[], nn.Module] = Flattened, seed: int = 0) -> Any:
    """A module with every parameter away from its initial value."""
    module = cls().double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def picture(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model: Any, x: Tensor) -> Tensor:
    return model(x).square().sum() + model(x).sum()


def slices(tensors: dict[str, Tensor], k: int) -> list[np.ndarray]:
    """Everything that goes with channel ``k``: one array a member, biases left out."""
    return [
        tensors["conv.weight"][k].numpy().ravel(),
        tensors["norm.weight"][k].numpy().ravel(),
        tensors["head.weight"][:, k * CELLS : (k + 1) * CELLS].numpy().ravel(),
    ]


def gradients(model: Any, batches: list[Tensor]) -> list[dict[str, Tensor]]:
    """The eager module's gradients, one dictionary a batch."""
    found = []
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return found


def element_scores(name: str, w: dict[str, Tensor], grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The score of every single weight, by the definition of the criterion."""
    total = {n: sum(g[n] for g in grads) for n in w}
    mean_square = {n: sum(g[n] ** 2 for g in grads) / len(grads) for n in w}
    return {
        "magnitude-l1": {n: w[n].abs() for n in w},
        "magnitude-l2": {n: w[n] ** 2 for n in w},
        "taylor": {n: (w[n] * total[n]).abs() for n in w},
        "taylor-multivariable": {n: w[n] * total[n] for n in w},
        "taylor-squared": {n: (w[n] * total[n]).abs() ** (1 if w[n].dim() < 2 else 2) for n in w},
        "hessian": {n: w[n] ** 2 * mean_square[n] for n in w},
    }[name]


def reference(name: str, model: nn.Module, batches: list[Tensor]) -> np.ndarray:
    """``[members, width]``, summed slice by slice."""
    w = {n: p.detach() for n, p in model.named_parameters()}
    elements = element_scores(name, w, gradients(model, batches))
    sums = np.array([[part.sum() for part in slices(elements, k)] for k in range(WIDTH)]).T
    return np.abs(sums)


REDUCE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda s: s.sum(0),
    "mean": lambda s: s.sum(0) / len(s),
    "max": lambda s: s.max(0),
    "prod": lambda s: s[0] * s[1] * s[2],
    "first": lambda s: s[0],
    "gate": lambda s: s[2],
}


def lamp(v: np.ndarray) -> np.ndarray:
    """Definition of LAMP: each score over the sum of those at and after it in ascending order."""
    order = sorted(range(len(v)), key=lambda i: v[i])
    out = np.zeros(len(v))
    for rank, i in enumerate(order):
        out[i] = v[i] / sum(v[j] for j in order[rank:])
    return out


NORMALISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda v: v,
    "sum": lambda v: v / v.sum(),
    "mean": lambda v: v / v.mean(),
    "max": lambda v: v / v.max(),
    "median": lambda v: v / sorted(v)[(len(v) - 1) // 2],
    "standardise": lambda v: (v - v.min()) / (v.max() - v.min()),
    "gaussian": lambda v: (v - v.mean()) / v.std(ddof=1),
    "lamp": lamp,
    # N of the largest, N = half of the width rounded up.
    "top": lambda v: 3 * v / sum(sorted(v)[-3:]),
}
# Of five scores: the smallest, ranks int(5 x), the largest; and the mean of the largest alone, of two, of all.
WITH_FRACTION: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sentinel-0": lambda v: v / sorted(v)[0],
    "sentinel-0.39": lambda v: v / sorted(v)[1],
    "sentinel-0.5": lambda v: v / sorted(v)[2],
    "sentinel-0.999": lambda v: v / sorted(v)[4],
    "top-0.1": lambda v: v / max(v),
    "top-0.4": lambda v: 2 * v / sum(sorted(v)[-2:]),
    "top-1": lambda v: v / v.mean(),
}


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Program, Context, list[Tensor]]:
    model = made()
    batches = list(picture(3).split(1))
    program = capture(model, (picture(2),))
    return model, program, Context(loss=loss, batches=batches), batches


def test_the_references_cover_every_reduction_and_normaliser() -> None:
    assert set(REDUCE) == set(REDUCTIONS)
    assert set(NORMALISE) == set(NORMALISERS)


@pytest.mark.parametrize(
    "criterion", ["magnitude-l1", "magnitude-l2", "taylor", "taylor-multivariable", "taylor-squared", "hessian"]
)
def test_every_reduction_and_normaliser_equals_the_loops_with_a_flattened_consumer(
    criterion: str, setting: Any
) -> None:
    model, program, ctx, batches = setting
    (group,) = depgraph(program).groups
    scoring = scoring_of(program, criterion, ctx)
    members = reference(criterion, model, batches)

    assert members.min() > 0
    for reduction, reduce in REDUCE.items():
        for normaliser, normalise in (NORMALISE | WITH_FRACTION).items():
            got = importance(group, scoring, criterion, reduction, normaliser)
            # The same sums of fewer than a hundred float64 numbers in another order.
            np.testing.assert_allclose(got.numpy(), normalise(reduce(members)), rtol=1e-10, err_msg=normaliser)


def test_taylor_counts_batch_norm_weights(setting: Any) -> None:
    model, program, ctx, batches = setting
    (group,) = depgraph(program).groups
    scores = CRITERIA["taylor"](
        scoring_of(program, "taylor", ctx), group, [m for m in group.members if m.name == "norm.weight"]
    )

    total = sum(g["norm.weight"] for g in gradients(model, batches))
    torch.testing.assert_close(scores[0], (model.norm.weight.detach() * total).abs())


class Streams(nn.Module):
    """An axis with a position table, one norm of each kind, and a scale for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)
        self.table, self.scale = nn.Parameter(torch.ones(1, 6, 8)), nn.Parameter(torch.ones(8))
        self.layer, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.group, self.batch = nn.GroupNorm(2, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x).transpose(1, 2) + self.table
        h = self.rms(self.layer(h)) * self.scale
        return self.o(self.batch(self.group(h.transpose(1, 2))))


@pytest.mark.parametrize("criterion", ["magnitude-l2", "taylor", "hessian"])
def test_every_parameter_that_carries_an_index_counts_norms_tables_and_scales_too(criterion: str) -> None:
    model = made(Streams)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    program = capture(model, (x,))
    (group,) = depgraph(program).groups
    loss(model, x).backward()
    carried = [(p.detach(), p.grad) for n, p in model.named_parameters() if 8 in p.shape and not n.endswith("bias")]
    biases = [(p.detach(), p.grad) for n, p in model.named_parameters() if 8 in p.shape and n.endswith("bias")]
    assert len(carried) == 8 and len(biases) == 4
    scoring = scoring_of(program, criterion, Context(loss=loss, batches=[x]))

    def score(p: Tensor, grad: Any) -> Tensor:
        each = {"magnitude-l2": p**2, "taylor": (p * grad).abs(), "hessian": (p * grad) ** 2}[criterion]
        return each.movedim(p.shape.index(8), 0).flatten(1).sum(1) if p.dim() > 1 else each

    wanted = sum(score(*pair) for pair in carried)
    torch.testing.assert_close(importance(group, scoring, criterion, "sum"), wanted)
    with_bias = sum((score(*pair) for pair in biases), wanted)
    torch.testing.assert_close(importance(group, scoring, criterion, "sum", include_bias=True), with_bias)


def test_scores_of_what_stays_are_those_of_its_positions_before() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, WIDTH), nn.Linear(4 + WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    model = made(Joined)
    program = capture(model, (torch.ones(2, 3, dtype=torch.float64),))

    def scores() -> Tensor:
        group = next(g for g in depgraph(program).groups if g.name == "b:hidden")
        return importance(group, scoring_of(program, "magnitude-l1"), "magnitude-l1", "sum")

    # The reader's columns of index k are 4 + k.
    whole = model.b.weight.detach().abs().sum(1) + model.c.weight.detach().abs().sum(0)[4:]
    torch.testing.assert_close(scores(), whole)
    resize(program, {"b:hidden": [1, 3]})
    torch.testing.assert_close(scores(), whole[[1, 3]])


def test_fpgm_is_the_sum_of_distances_to_the_other_filters_unsquared_weights() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 5, 2),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    )
    program = capture(made(lambda: model), (picture(2),))
    scoring = scoring_of(program, "fpgm")
    first, second, third = depgraph(program).groups

    for group, rows in (
        (first, model[0].weight.detach().flatten(1)),
        (second, model[2].weight.detach().flatten(1)),
        (third, model[4].weight.detach().transpose(0, 1).flatten(1)),
    ):
        want = [sum(float((a - b).norm()) for b in rows) for a in rows]
        # The input side of the next layer takes no part: one member is scored.
        np.testing.assert_allclose(importance(group, scoring, "fpgm", "sum").numpy(), want, rtol=1e-6)
    reads = model[2].weight.detach().transpose(0, 1).flatten(1)
    rows = model[0].weight.detach().flatten(1)
    both = [sum(float((a - b).norm()) for b in r) for r in (rows, reads) for a in r]
    want = [(both[i] + both[i + 6]) / 2 for i in range(6)]
    np.testing.assert_allclose(importance(first, scoring, "group-fpgm").numpy(), want, rtol=1e-6)


def test_fpgm_calls_a_filter_at_the_geometric_median_the_least_important() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        # The corners of a square and its centre. By magnitude the centre is the largest.
        model[0].weight.copy_(torch.tensor([[9.0, 9.0], [9.0, 11.0], [10.0, 10.0], [11.0, 9.0], [11.0, 11.0]]))
    program = capture(model.eval(), (torch.ones(2, 2),))
    (group,) = depgraph(program).groups

    assert int(importance(group, scoring_of(program, "fpgm"), "fpgm").argmin()) == 2


def test_bn_scale_is_the_absolute_weight_of_the_batch_norms_alone(setting: Any) -> None:
    model, program, _, _ = setting
    (group,) = depgraph(program).groups

    got = importance(group, scoring_of(program, "bn-scale"), "bn-scale", "sum")
    torch.testing.assert_close(got, model.norm.weight.detach().abs())


def test_bn_scale_and_fpgm_say_why_they_cannot_score_a_group() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    program = capture(Looked().eval(), (torch.ones(2, 5, dtype=torch.long),))
    (group,) = depgraph(program).groups
    with pytest.raises(NotScoredError, match=r"bn-scale cannot score the group 'table:hidden': no batch norm"):
        importance(group, scoring_of(program, "bn-scale"), "bn-scale")
    with pytest.raises(NotScoredError, match=r"fpgm cannot score the group 'table:hidden': no weight of a convolution"):
        importance(group, scoring_of(program, "fpgm"), "fpgm")


def test_a_parameter_that_the_loss_ignores_is_not_scored() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(self.a(x)), self.d(self.c(x))

    program = capture(Branches().eval(), (torch.ones(2, 3),))
    used, unused = depgraph(program).groups
    ctx = Context(loss=lambda p, x: p(x)[0].sum(), batches=[torch.ones(2, 3)])
    scoring = scoring_of(program, "taylor", ctx)

    assert importance(used, scoring, "taylor").shape == (4,)
    with pytest.raises(NotScoredError, match="no member of it received a gradient"):
        importance(unused, scoring, "taylor")


def test_random_is_the_same_for_the_same_seed_and_differs_between_seeds_and_groups() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)), (torch.ones(2, 3),))
    a, b = depgraph(program).groups
    scores = [importance(g, Scoring({}, seed=s), "random") for g, s in ((a, 0), (a, 0), (a, 1), (b, 0))]

    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[3])


def test_biases_are_scored_only_when_asked_for(setting: Any) -> None:
    _, program, _, _ = setting
    (group,) = depgraph(program).groups
    scoring = scoring_of(program, "magnitude-l1")
    without = importance(group, scoring, "magnitude-l1", "sum")
    with_bias = importance(group, scoring, "magnitude-l1", "sum", include_bias=True)

    biases = sum(program.tensors()[n].detach().abs() for n in ("conv.bias", "norm.bias"))
    torch.testing.assert_close(with_bias - without, biases)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("conv.bias", True),
        ("attn.in_proj_bias", True),
        ("rnn.bias_hh_l0", True),
        ("conv.weight", False),
        ("attn.relative_position_bias_table", False),
        ("unbiased.weight", False),
    ],
)
def test_what_counts_as_a_bias(name: str, bias: bool) -> None:
    assert is_bias(name) == bias


@pytest.mark.parametrize("normaliser", [*NORMALISERS, *WITH_FRACTION])
def test_normalisers_are_finite_for_equal_zero_and_single_scores(normaliser: str) -> None:
    for scores in (torch.ones(4), torch.zeros(4), torch.ones(1), torch.zeros(1)):
        assert torch.isfinite(normaliser_of(normaliser)(scores)).all()


@pytest.mark.parametrize("normaliser", sorted({*NORMALISERS, *WITH_FRACTION} - {"none"}))
def test_normalised_scores_do_not_depend_on_the_scale_of_the_gradients(normaliser: str) -> None:
    scores = torch.tensor([0.3, 1.0, 0.1, 2.0, 0.7], dtype=torch.float64)
    # A power of two scales without rounding.
    small = normaliser_of(normaliser)(scores * 2.0**-60)
    torch.testing.assert_close(small, normaliser_of(normaliser)(scores), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normaliser": "sentinel-1"}, r"normaliser sentinel takes a fraction in \[0, 1\), got 'sentinel-1'"),
        ({"normaliser": "top-0"}, r"normaliser top takes a fraction in \(0, 1\], got 'top-0'"),
        ({"normaliser": "sentinel"}, "normaliser must be one of none, .*, sentinel-FRACTION, .*got 'sentinel'"),
        ({"reduction": "least"}, "reduction must be one of sum, .*, or a function given from Python, got 'least'"),
        ({"reduction": 3}, "reduction must be one of .* got 3"),
        ({"normaliser": ["mean"]}, r"normaliser must be one of .* got \['mean'\]"),
    ],
)
def test_an_unknown_reduction_or_normaliser_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoveChannels(**options)


# ---------------------------------------------------------------------- functions of the caller's


def strongest_two(scores: Tensor) -> Tensor:
    return scores.topk(2, dim=0).values.sum(0)


def squared(scores: Tensor) -> Tensor:
    return scores**2


def test_functions_reduce_and_normalise_and_the_record_says_which(setting: Any) -> None:
    _, program, _, _ = setting
    (group,) = depgraph(program).groups
    scoring = scoring_of(program, "magnitude-l1")
    members = torch.stack(CRITERIA["magnitude-l1"](scoring, group, [m for m in group.parameters if m.name[-1] == "t"]))
    assert members.shape == (3, WIDTH)
    wanted = (members.sum(0) - members.amin(0)) ** 2
    torch.testing.assert_close(importance(group, scoring, "magnitude-l1", strongest_two, squared), wanted)

    step = RemoveChannels(ratio=0.4, criterion="magnitude-l1", reduction=strongest_two, normaliser=squared)
    result = Pipeline([step])(program)
    kept = sorted(wanted.argsort(descending=True)[:3].tolist())
    assert list(result.removal.groups[group.name].kept) == kept
    assert f'reduction="{__name__}:strongest_two", normaliser="{__name__}:squared"' in result.records[0].text


@pytest.mark.parametrize(
    ("function", "got"), [(lambda s: s[:2], r"\[2\]"), (lambda s: 1.0, "float"), (lambda s: s[None], r"\[1, 5\]")]
)
def test_a_function_that_does_not_give_one_score_an_index_is_refused(function: Any, got: str, setting: Any) -> None:
    message = rf"<lambda>\" returned {got} for the group 'conv:channel'; it must return .* of the shape \[5\]"
    with pytest.raises(PreconditionError, match=message):
        Pipeline([RemoveChannels(normaliser=function)])(setting[1])


def test_recipes_take_names_only() -> None:
    step = RemoveChannels(normaliser=squared)
    message = f"normaliser is the function {__name__}:squared, and recipes take names only: give one of the names, or"
    with pytest.raises(OptionError, match=message):
        plain(step)
    with pytest.raises(OptionError, match=message):
        Recipe(model="m", passes=(step,)).to_yaml()
    # Nor is the name of a function looked up.
    with pytest.raises(OptionError, match="normaliser must be one of none, .* a function given from Python, got"):
        make(*parse(str(step)))
    assert make("remove-channels", {"normaliser": "sentinel-0.25"}) == RemoveChannels(normaliser="sentinel-0.25")
    assert make(*parse("remove-channels{normaliser=top-0.1}")) == RemoveChannels(normaliser="top-0.1")


def test_half_precision_weights_are_squared_in_float32() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e-4)  # its square is below the smallest half-precision number
    program = capture(model.to("cpu").eval(), (torch.ones(2, 3, dtype=torch.float16),))
    (group,) = depgraph(program).groups
    assert (importance(group, scoring_of(program, "magnitude-l2"), "magnitude-l2") > 0).all()


def test_scores_that_are_not_finite_name_the_group_and_the_criterion() -> None:
    model = made()
    with torch.no_grad():
        model.conv.weight[1, 0, 0, 0] = float("nan")
    program = capture(model, (picture(2),))
    (group,) = depgraph(program).groups
    with pytest.raises(
        PreconditionError, match="magnitude-l2 gives scores that are not finite for the group 'conv:channel'"
    ):
        importance(group, scoring_of(program, "magnitude-l2"), "magnitude-l2")


def test_weights_on_the_meta_device_are_refused_and_random_still_plans() -> None:
    with torch.device("meta"):
        program = capture(Flattened().eval(), (torch.empty(2, 3, 4, 4),))
    (group,) = depgraph(program).groups
    with pytest.raises(PreconditionError, match="meta device"):
        importance(group, scoring_of(program, "magnitude-l2"), "magnitude-l2")
    assert importance(group, scoring_of(program, "random"), "random").shape == (WIDTH,)
