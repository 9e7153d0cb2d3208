"""Clean-up passes: equal outputs before and after, what they refuse, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.errors import GraphwrightError
from graphwright.graph.program import Program
from graphwright.passes.base import Pipeline
from graphwright.passes.eliminate_dead_code import EliminateDeadCode
from graphwright.passes.fold_batch_norm import FoldBatchNorm
from graphwright.passes.remove_dropout import RemoveDropout


def filled(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                value = torch.randn(t.shape, generator=generator)
                t.copy_(value.abs() + 0.5 if "var" in name else value)
    return model.eval()


def targets(program: Program) -> list[str]:
    return [str(n.target) for n in program.nodes if n.op == "call_function"]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- dropout


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_inference_dropout_goes_and_outputs_are_equal_bit_for_bit(kind: type[nn.Module]) -> None:
    model, x = filled(nn.Sequential(nn.Conv2d(3, 4, 1), kind(0.3), nn.ReLU(), kind(0.2))), noise(2, 3, 4, 4)
    program = capture(model, (x,))
    before = sum("dropout" in t for t in targets(program))
    done = Pipeline([RemoveDropout()])(program)

    assert before == 2 and done.records[0].result.stats["dropouts_removed"] == 2
    assert not any("dropout" in t for t in targets(done.output))
    assert torch.equal(done.output(x), model(x))


def test_training_dropout_stays_and_is_reported() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True) + nn.functional.dropout(x, 0.0, training=True)

    result = RemoveDropout()(capture(Always(), (noise(2, 3),)))
    # With probability 0 it does nothing in training either.
    assert result.stats["dropouts_removed"] == 1
    assert [s.reason for s in result.skipped] == ["it is in training mode"]


# ---------------------------------------------------------------------- dead code


class Dead(nn.Module):
    """Branches that nothing uses, one of them with parameters, one that writes in place."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.used, self.unused, self.inplace = nn.Linear(3, 4), nn.Linear(3, 5), inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.used(x)
        self.unused(x).relu().sum()
        if self.inplace:
            y.add_(1.0)
        return y


def test_unused_branches_go_with_the_parameters_only_they_read() -> None:
    model, x = filled(Dead()), noise(2, 3)
    program = capture(model, (x,))
    before = len(program.tensors())
    done = Pipeline([EliminateDeadCode()])(program)
    stats = done.records[0].result.stats

    assert set(done.output.tensors()) == {"used.weight", "used.bias"}
    assert stats["tensors_dropped"] == before - 2 and stats["nodes_removed"] >= 1
    assert dict(done.output.module().named_parameters()).keys() == {"used.weight", "used.bias"}
    assert torch.equal(done.output(x), model(x))
    assert {"unused.weight", "unused.bias"} <= set(dict(model.named_parameters()))


def test_a_write_in_place_is_no_dead_code() -> None:
    model, x = filled(Dead(inplace=True)), noise(2, 3)
    program = capture(model, (x,))
    want = model(x)
    done = Pipeline([EliminateDeadCode()])(program)
    assert torch.equal(done.output(x), want)
    assert any("add" in t for t in targets(done.output))


def test_an_unused_input_stays_an_input() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2

    x, y = noise(2, 3), noise(2, 4)
    done = Pipeline([EliminateDeadCode()])(capture(Second(), (x, y)))
    assert [i.name for i in done.output.inputs] == ["x", "y"]
    assert torch.equal(done.output(x, y), x * 2)


# ---------------------------------------------------------------------- batch norm


FOLDED = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (2, 3, 8)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 5, 2), nn.BatchNorm3d(5)), (2, 3, 4, 4, 4)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6)),
    "without_bias": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)), (2, 3, 6, 6)),
    "without_affine": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), (2, 3, 6, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), (4, 3)),
    "padding_same": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding="same"), nn.BatchNorm2d(5)), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_batch_norm_is_folded_into_the_layer_before_it(name: str) -> None:
    build, shape = FOLDED[name]
    model, x = filled(build()).double(), noise(*shape).double()
    done = Pipeline([FoldBatchNorm()])(capture(model, (x,)))

    assert done.records[0].result.stats["batch_norms_folded"] == 1
    assert not any("batch_norm" in t for t in targets(done.output))
    # Float64, and the division by the deviation happens once instead of per output.
    torch.testing.assert_close(done.output(x), model(x), rtol=1e-10, atol=1e-10)
    assert model(x).abs().max() > 0.1


def test_folding_makes_new_parameters_and_keeps_their_dtype_and_flag() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    model[0].weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = Pipeline([FoldBatchNorm()])(capture(model, (noise(2, 3, 6, 6),)))

    assert set(done.output.parameters()) == {"0.weight", "0.folded_bias"}
    assert set(dict(done.output.module().named_parameters())) == {"0.weight", "0.folded_bias"}
    assert set(dict(done.output.module().named_buffers())) <= {"1.num_batches_tracked"}
    assert not done.output.parameters()["0.weight"].requires_grad
    assert {p.dtype for p in done.output.parameters().values()} == {torch.float32}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class Wired(nn.Module):
    """A convolution and a batch norm, connected in some way."""

    def __init__(self, how: Callable[[Wired, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), how
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


REFUSED = {
    "other_users": (lambda m, x: m.norm(h := m.conv(x)) + h, {}, "has 2 users"),
    "no_layer_before": (lambda m, x: m.conv(m.norm(x.relu())), {}, "not a convolution or linear layer"),
    "an_activation_between": (lambda m, x: m.norm(m.conv(x).relu()), {}, "not a convolution or linear layer"),
    "a_weight_used_twice": (lambda m, x: m.norm(m.conv(x)) + m.conv(x * 2), {}, "is used elsewhere too"),
    "no_statistics": (
        lambda m, x: m.plain(m.conv(x)),
        {"plain": nn.BatchNorm2d(3, track_running_stats=False)},
        "training mode",
    ),
    "features_last": (
        lambda m, x: m.first(m.line(x.flatten(2))),
        {"line": nn.Linear(16, 4), "first": nn.BatchNorm1d(3)},
        "features are not dimension 1",
    ),
    "no_batch": (
        # A convolution's result without a batch is [channels, length], and the batch norm takes lengths for channels.
        lambda m, x: m.first(m.line(x.flatten(2)[0])),
        {"line": nn.Conv1d(3, 16, 1), "first": nn.BatchNorm1d(16)},
        "has no batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_batch_norm_that_cannot_be_folded_stays_and_says_why(name: str) -> None:
    how, more, reason = REFUSED[name]
    model, x = filled(Wired(how, **more)), noise(2, 3, 4, 4)
    done = Pipeline([FoldBatchNorm()])(capture(model, (x,)))
    result = done.records[0].result

    assert not result.modified and result.stats["batch_norms_folded"] == 0
    assert len(result.skipped) == 1 and reason in result.skipped[0].reason
    assert torch.equal(done.output(x), model(x))


def test_a_batch_norm_in_training_stays() -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(self.conv(x), None, None, self.scale, training=True)

    result = FoldBatchNorm()(capture(Training().eval(), (noise(2, 3, 4, 4),)))
    assert [s.reason for s in result.skipped] == ["it is in training mode"]


def test_tied_convolutions_are_not_folded_twice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    model, x = filled(model), noise(2, 3, 4, 4)
    done = Pipeline([FoldBatchNorm()])(capture(model, (x,)))
    assert done.records[0].result.stats["batch_norms_folded"] == 0
    assert torch.equal(done.output(x), model(x))


def test_a_layer_with_two_norms_in_a_row_folds_both() -> None:
    model, x = (
        filled(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5))).double(),
        noise(2, 3, 6, 6),
    )
    done = Pipeline([FoldBatchNorm()])(capture(model, (x.double(),)))
    assert done.records[0].result.stats["batch_norms_folded"] == 2
    torch.testing.assert_close(done.output(x.double()), model(x.double()), rtol=1e-10, atol=1e-10)


def test_passes_chain_and_an_error_names_the_pass_and_those_before_it() -> None:
    model, x = filled(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.ReLU())), noise(2, 3, 6, 6)
    done = Pipeline([RemoveDropout(), FoldBatchNorm(), EliminateDeadCode()])(capture(model, (x,)))
    assert targets(done.output) == ["aten.conv2d.default", "aten.relu.default"]

    class Broken(RemoveDropout):
        def requires(self, program: Program) -> None:
            raise GraphwrightError("no")

    with pytest.raises(GraphwrightError) as caught:
        Pipeline([FoldBatchNorm(), Broken()])(capture(model, (x,)))
    assert caught.value.__notes__ == ["in pass remove-dropout; passes already applied: fold-batch-norm"]
