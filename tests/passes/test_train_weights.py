"""Training as a pass: fine-tuning, distillation from the original, sparse training before a removal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.frontends.write_back import write_back
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import PreconditionError
from graphwright.graph.program import Program
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.criteria import Scoring
from graphwright.passes.remove_channels import RemoveChannels
from graphwright.passes.sparse_training import PENALTIES, group_importance, shrinkage_strengths
from graphwright.passes.train_weights import TrainWeights
from graphwright.passes.trainer import Training, train


class Net(nn.Module):
    """Convolutions with batch norms and a shortcut; the classifier's weight is tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.block = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(96, 1, 6, 6, generator=generator)
    # Classes by the brighter of the halves, up and down, left and right.
    labels = 2 * (images[..., :3, :].sum((1, 2, 3)) > 0).long() + (images[..., :3].sum((1, 2, 3)) > 0).long()
    return [(images[i : i + 32], labels[i : i + 32]) for i in (0, 32, 64)]


def loss(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.fixture(scope="module")
def trained() -> Program:
    """A network that has learned its task, so that a teacher has something to teach."""
    torch.manual_seed(0)
    program = capture(Net().eval(), (torch.randn(2, 1, 6, 6),))
    step = TrainWeights(steps=150, learning_rate=0.02)
    done = Pipeline([step])(program, Context(loss=loss, training=batches()))
    assert mean_loss(done.program) < 0.5 * mean_loss(program)
    return done.program


def mean_loss(program: Program) -> float:
    with torch.no_grad():
        return sum(float(loss(program, batch)) for batch in batches()) / 3


def distance(one: Program, other: Program) -> float:
    with torch.no_grad():
        return float(sum(((one(x) - other(x)) ** 2).mean() for x, _ in batches()))


HALF = RemoveChannels(ratio=0.5)


def test_recovery_trains_the_smaller_program_and_writes_into_no_tensor_of_the_callers(trained: Program) -> None:
    before = {name: t.clone() for name, t in trained.tensors().items()}
    cut = Pipeline([HALF])(trained).program
    done = Pipeline([HALF, TrainWeights(steps=60, learning_rate=0.02)])(trained, Context(loss=loss, training=batches()))
    assert all(torch.equal(t, before[name]) for name, t in trained.tensors().items())
    assert {n: t.shape for n, t in done.program.tensors().items()} == {n: t.shape for n, t in cut.tensors().items()}
    assert mean_loss(done.program) < 0.5 * mean_loss(cut)
    stats = done.records[-1].result.stats
    assert stats["steps"] == 60 and stats["loss_last_tenth"] < stats["loss_first_tenth"]


@pytest.mark.parametrize("distance_name", ["mse", "kl"])
def test_a_teacher_pulls_the_outputs_towards_the_originals(trained: Program, distance_name: str) -> None:
    context = Context(loss=loss, training=batches())
    cut = Pipeline([HALF])(trained).program
    taught = Pipeline(
        [HALF, TrainWeights(steps=60, learning_rate=0.02, distil=1.0, distance=distance_name, temperature=2.0)]
    )(trained, context).program
    alone = Pipeline([HALF, TrainWeights(steps=60, learning_rate=0.02)])(trained, context).program

    def apart(program: Program) -> float:
        if distance_name == "mse":
            return distance(program, trained)
        with torch.no_grad():
            logs = [(program(x).log_softmax(1), trained(x).log_softmax(1)) for x, _ in batches()]
        return float(sum((t.exp() * (t - s)).sum(1).mean() for s, t in logs))

    assert apart(taught) < 0.5 * apart(cut) and apart(taught) < apart(alone)
    assert context.original is None and not context.removal.groups  # the caller's context is as it was


def test_the_loss_of_a_distillation_is_the_one_of_the_definition(trained: Program) -> None:
    """One step of gradient descent without momentum, against autograd on modules built from the kept slices."""
    step = TrainWeights(steps=1, learning_rate=0.1, optimizer="sgd", clip=0, distil=0.3, features=("stem", "block.0"))
    half = Pipeline([HALF])(trained)
    got = Pipeline([HALF, step])(trained, Context(loss=loss, training=batches()[:1])).program

    student, teacher = Net().eval(), Net().eval()
    teacher.load_state_dict({**teacher.state_dict(), **trained.tensors()})
    for name, tensor in half.program.tensors().items():
        path, _, leaf = name.rpartition(".")
        owner = student.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor.detach().clone()))
        else:
            setattr(owner, leaf, tensor)
    kept = {name: torch.tensor(cut.kept) for name, cut in half.removal.groups.items()}
    stem, inner = (kept[next(n for n in kept if n.startswith(start))] for start in ("stem", "block.0"))
    assert len(stem) == 6 and len(inner) == 8
    x, y = batches()[0]
    with torch.no_grad():
        teacher_stem = teacher.stem(x)
        teacher_inner = teacher.block[0](torch.relu(teacher_stem))
        wanted = teacher(x)
    student_stem = student.stem(x)
    student_inner = student.block[0](torch.relu(student_stem))
    square = nn.functional.mse_loss
    features = (square(student_stem, teacher_stem[:, stem]) + square(student_inner, teacher_inner[:, inner])) / 2
    total = 0.7 * nn.functional.cross_entropy(student(x), y) + 0.3 * (square(student(x), wanted) + features)
    total.backward()
    moved = 0.0
    for name, parameter in student.named_parameters():
        grad = parameter.grad
        assert grad is not None
        torch.testing.assert_close(got.tensors()[name], parameter.detach() - 0.1 * grad, msg=name)
        moved = max(moved, float(grad.abs().max()))
    assert moved > 0.01


def test_an_interrupted_training_goes_on(trained: Program, tmp_path: Path) -> None:
    step = TrainWeights(steps=6, learning_rate=0.02, save_every=2, penalty="growing")
    whole = Pipeline([step])(trained, Context(loss=loss, training=batches())).program

    def killer(what: str, done: int, total: int) -> None:
        if what == "train" and done == 5:
            raise KeyboardInterrupt

    checkpoints = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        Pipeline([step])(trained, Context(loss=loss, training=batches(), checkpoints=checkpoints, progress=killer))
    again = Pipeline([step])(trained, Context(loss=loss, training=batches(), checkpoints=checkpoints))
    assert again.records[0].result.stats["steps_resumed"] == 4
    assert all(torch.equal(t, whole.tensors()[name]) for name, t in again.program.tensors().items())


def test_frozen_parameters_stay(trained: Program) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    net.stem.requires_grad_(False)
    program = capture(net, (torch.randn(2, 1, 6, 6),))
    after = Pipeline([TrainWeights(steps=3, learning_rate=0.02)])(
        program, Context(loss=loss, training=batches())
    ).program
    for name, tensor in program.tensors().items():
        trains = isinstance(tensor, nn.Parameter) and not name.startswith("stem")
        assert torch.equal(tensor, after.tensors()[name]) != trains, name


@pytest.mark.parametrize("kind", sorted(PENALTIES))
def test_penalties_shrink_what_matters_least_the_most(trained: Program, kind: str) -> None:
    graph, tensors = depgraph(trained), trained.tensors()
    penalty = PENALTIES[kind](graph, 1e-2)
    gradients = penalty(tensors)
    if kind == "growing":
        for _ in range(2 * penalty.every):  # type: ignore[attr-defined]
            gradients = penalty(tensors)
    assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients.values())
    if kind == "bn-scale":
        assert set(gradients) == {"stem.1.weight", "block.1.weight"}
        assert all(torch.equal(g, 1e-2 * tensors[n].sign()) for n, g in gradients.items())
        return
    # Of the hidden group, every slice of an index shrinks by the same factor: what the definition says.
    group = next(g for g in graph.groups if g.size == 16)
    scores = group_importance(group, Scoring(tensors))
    if kind == "group-lasso":
        wanted = 1e-2 * shrinkage_strengths(scores)
    else:
        wanted = 1e-2 + 2 * 1e-2 * (scores.max() - scores) / (scores.max() - scores.min())
    found = (gradients["block.0.bias"] / tensors["block.0.bias"]).detach().double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        (gradients["block.1.weight"] / tensors["block.1.weight"]).double(), wanted, rtol=1e-4, atol=1e-7
    )
    assert int(wanted.argmax()) == int(scores.argmin())


def test_sparse_training_makes_a_removal_cost_less(trained: Program) -> None:
    """The paper's claim, on a small scale: equally long training with and without the penalty, then the same removal."""
    after = {}
    for penalty in ("", "group-lasso"):
        step = TrainWeights(steps=300, learning_rate=0.02, optimizer="sgd", penalty=penalty, penalty_strength=5e-3)
        sparse = Pipeline([step])(trained, Context(loss=loss, training=batches())).program
        cut = Pipeline([RemoveChannels(ratio=0.5)])(sparse).program
        after[penalty] = mean_loss(cut) - mean_loss(sparse)
    assert after["group-lasso"] < 0.7 * after[""]


def test_wrong_input_is_refused(trained: Program) -> None:
    def refused(said: str, step: TrainWeights, context: Context) -> None:
        with pytest.raises(PreconditionError, match=said):
            Pipeline([step])(trained, context)

    whole = Context(loss=loss, training=batches())
    refused("give Context\\(loss=..., training=", TrainWeights(steps=1), Context(loss=loss, batches=batches()))
    refused("no module or node 'stme'; did you mean 'stem", TrainWeights(steps=1, distil=1, features=("stme",)), whole)
    refused(
        "does not call the module",
        TrainWeights(steps=1, distil=1),
        Context(lambda m, b: b[0].sum(), training=batches()),
    )
    with pytest.raises(PreconditionError, match="run this in a Pipeline"):
        TrainWeights(steps=1, distil=0.5)(trained.copy(), whole)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"distil": 1.5}, "distil must be in"),
        ({"distance": "cosine"}, "distance must be one of kl, mse"),
        ({"penalty": "l0"}, "penalty must be one of bn-scale, group-lasso, growing"),
        ({"features": ("stem",)}, "give distil as well"),
    )
    for options, said in wrong:
        with pytest.raises(ValueError, match=said):
            TrainWeights(steps=1, **options)
    plain = capture(nn.Linear(4, 2).eval(), (torch.randn(3, 4),))
    with pytest.raises(PreconditionError, match="no batch norm with a weight"):
        Pipeline([TrainWeights(steps=1, penalty="bn-scale")])(plain, whole)


def test_a_written_back_module_is_trained_in_train_mode() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    result = Pipeline([HALF])(capture(model, (torch.randn(2, 1, 6, 6),)))
    smaller = write_back(model, result)
    assert isinstance(smaller, Net) and smaller.head.in_features == 6
    norm: Any = smaller.stem[1]
    statistics = norm.running_mean.clone()
    smaller.train()
    done = train(smaller, loss, batches(), Training(steps=60, learning_rate=0.02))
    assert smaller.training  # as the caller left it
    assert done.losses[-1] < 0.6 * done.losses[0]
    assert not torch.equal(norm.running_mean, statistics)  # batch norms went along, unlike in a program
    assert model.head.in_features == 12
