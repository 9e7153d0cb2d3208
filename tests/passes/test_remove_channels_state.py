"""Channel removal and what parameters are besides numbers: tied, frozen, buffers; and bad input in one sentence."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.cost import parameter_count
from graphwright.graph.depgraph import depgraph
from graphwright.graph.errors import PreconditionError
from graphwright.graph.oracle import masked_outputs, masked_parameters
from graphwright.graph.resize import RemovalRecord
from graphwright.passes import options
from graphwright.passes.base import Context, Pipeline
from graphwright.passes.remove_channels import RemoveChannels

# Float64 sums of at most a few hundred terms, in another order.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: nn.Module) -> Any:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=i))
    return model.double().eval()


class TiedLanguageModel(nn.Module):
    """An embedding whose table is also the output layer, around a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(h + self.down(self.up(h).relu()))


class Frozen(nn.Module):
    """A frozen stem, a segment without gradients, a detached input, and a buffer per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.tail, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("shift", torch.arange(6.0) / 6)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.stem(x).relu()
        h = self.body(h.detach()) * self.shift
        return self.head(h + self.tail(h).relu())


def check(model: nn.Module, x: Tensor, **asked: Any) -> Any:
    """Remove half, compare with the eager module with masked parameters, and return the smaller program."""
    program = capture(model, (x,))
    done = Pipeline([RemoveChannels(**{"ratio": 0.5, **asked})])(program)
    assert done.removal.groups
    want = torch.func.functional_call(model, masked_parameters(model, done.removal), (x,))
    torch.testing.assert_close(done.output(x), want, **EXACT)
    assert want.abs().max() > 0.1
    assert not torch.allclose(want, model(x), rtol=1e-3)
    return done


def test_a_tied_table_stays_tied_and_is_counted_once() -> None:
    model = filled(TiedLanguageModel())
    done = check(model, torch.arange(8).view(2, 4))

    tensors = done.output.tensors()
    assert tensors["table.weight"] is tensors["head.weight"]
    assert tensors["table.weight"].shape == (11, 3) and tensors["up.weight"].shape == (5, 3)
    assert set(done.removal.tensors) >= {"table.weight", "head.weight"}
    assert done.records[0].result.stats["parameters_after"] == 11 * 3 + 5 * 3 + 5 + 3 * 5 + 3
    assert done.output.copy().tensors()["table.weight"] is done.output.copy().tensors()["head.weight"]


def test_frozen_detached_and_ungraded_segments_shrink_and_keep_their_flags() -> None:
    done = check(filled(Frozen()), noise(3, 4))
    tensors = done.output.tensors()

    assert {w.group: w.after for w in done.records[0].result.widths} == {"stem:hidden": 4, "body:hidden": 3}
    assert [n for n, p in done.output.parameters().items() if not p.requires_grad] == ["stem.weight", "stem.bias"]
    assert not isinstance(tensors["shift"], nn.Parameter) and tensors["shift"].shape == (3,)


def test_a_frozen_parameter_takes_part_in_gradient_criteria() -> None:
    class Plain(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x).relu()) * self.shift)

    model, x = filled(Plain()), noise(3, 4)
    ctx = Context(loss=lambda p, b: p(b).square().mean(), batches=[x])
    done = Pipeline([RemoveChannels(ratio=0.5, criterion="taylor")])(capture(model, (x,)), ctx)
    assert not model.stem.weight.requires_grad and model.stem.weight.grad is None
    assert not done.output.parameters()["stem.weight"].requires_grad
    assert done.output.parameters()["stem.weight"].shape == (4, 4)


def test_the_callers_module_and_program_are_as_they_were() -> None:
    model, x = filled(TiedLanguageModel()), torch.arange(8).view(2, 4)
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.eval()
    program = capture(model, (x,))
    want = program(x)
    Pipeline([RemoveChannels(ratio=0.5)])(program)

    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.head.weight is model.table.weight
    assert torch.equal(program(x), want)


def test_new_parameters_have_memory_of_their_own() -> None:
    model, x = filled(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))), noise(2, 4)
    done = Pipeline([RemoveChannels(ratio=0.5)])(capture(model, (x,)))
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        done.output.tensors()["0.weight"].zero_()
    assert torch.equal(model[0].weight, before)


def test_the_record_names_every_cut_slice_and_replays_on_a_checkpoint_after_a_file() -> None:
    model = filled(TiedLanguageModel())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ids = torch.arange(8).view(2, 4)
    result = Pipeline([RemoveChannels(ratio=0.3), RemoveChannels(ratio=0.3)])(capture(model, (ids,)))
    record = RemovalRecord.from_json(json.loads(json.dumps(result.removal.to_json())))
    left = result.program.tensors()
    # Both sides of every weight and the norms of the table's two names: roots alone would leave the readers whole.
    cut = {(name, dim) for name, dims in record.tensors.items() for dim in dims}
    assert cut == {(n, d) for n, t in left.items() for d in range(t.dim()) if t.shape[d] != before[n].shape[d]}
    assert {("table.weight", 1), ("head.weight", 1), ("up.weight", 1), ("down.weight", 0)} <= cut
    for name, tensor in before.items():
        assert torch.equal(record.apply(name, tensor), left[name]), name


def test_the_state_of_an_optimiser_is_cut_by_the_record_and_goes_on() -> None:
    """Training what was masked, with its state masked too, is training what was cut, with its state cut."""
    x, y = noise(16, 4), noise(16, 2, seed=9)
    model = filled(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))

    def train(module: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (module(x) - y).square().mean().backward()
            optimizer.step()

    whole = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, whole, 5)
    result = Pipeline([RemoveChannels(ratio=0.5)])(capture(model, (x,)))
    # Copies: what is not cut is the caller's own tensor still.
    smaller, record, names = (
        copy.deepcopy(result.program.module()),
        result.removal,
        [n for n, _ in model.named_parameters()],
    )
    state = whole.state_dict()
    for i, name in enumerate(names):
        entry = state["state"][i]
        state["state"][i] = {k: (record.apply(name, t) if t.dim() else t).clone() for k, t in entry.items()}
    found = dict(smaller.named_parameters())
    assert list(found) == names and found["0.weight"].shape == (4, 4)
    with torch.no_grad():
        for name, masked in masked_parameters(model, record).items():
            p = model.get_parameter(name)
            gone = masked == 0
            assert int(gone.sum()) == p.numel() // 2
            p.copy_(masked)
            for key in ("exp_avg", "exp_avg_sq"):
                whole.state[p][key][gone] = 0
    cut = torch.optim.Adam(smaller.parameters(), 1e-2)
    cut.load_state_dict(state)
    train(model, whole, 5)
    train(smaller, cut, 5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(record.apply(name, p.detach()), found[name].detach(), **EXACT)


def test_sizes_are_those_of_the_weights_and_not_of_attributes() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    model[0].out_channels, model[2].in_channels = 99, 7
    program = capture(model, (noise(2, 3, 4, 4),))
    assert [(g.name, g.size) for g in depgraph(program).groups] == [("0:channel", 8)]
    smaller = Pipeline([RemoveChannels(ratio=0.5)])(program).program
    assert smaller.tensors()["2.weight"].shape == (2, 4, 1, 1)


@pytest.mark.parametrize(("build", "x"), [(TiedLanguageModel, torch.arange(8).view(2, 4)), (Frozen, noise(3, 4))])
def test_the_parameter_count_never_grows(build: Any, x: Tensor) -> None:
    model = filled(build())
    program = capture(model, (x,))
    for ratio in (0.0, 0.01, 0.1, 0.5, 0.99):
        for scope in ("local", "global"):
            result = Pipeline([RemoveChannels(ratio=ratio, scope=scope)])(program).records[0].result
            before, after = result.stats["parameters_before"], result.stats["parameters_after"]
            assert before == parameter_count(model)
            assert after <= before
            assert (after < before) == (result.stats["indices_removed"] > 0) == result.modified


def test_equal_scores_everywhere_still_remove_the_wanted_number() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.3)
    done = check(model, noise(3, 4), scope="global")
    assert done.records[0].result.stats["indices_removed"] == 8


def test_a_removal_under_a_norm_equals_the_graph_oracle_and_is_labelled() -> None:
    model = filled(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    x = noise(3, 4)
    program = capture(model, (x,))
    graph = depgraph(program)
    done = Pipeline([RemoveChannels(ratio=0.5)])(program)

    assert graph.groups[0].exactness == "renormalised"
    kept = {name: list(cut.kept) for name, cut in done.removal.groups.items()}
    torch.testing.assert_close(done.output(x), masked_outputs(graph, kept, [x])[0], **EXACT)


# ---------------------------------------------------------------------- bad input, one clear sentence each


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, r"ratio must be in \[0, 1\), got -0.1"),
        ({"ratio": float("nan")}, r"ratio must be in \[0, 1\), got nan"),
        ({"ratio": "half"}, r"ratio must be in \[0, 1\), got 'half'"),
        ({"head_ratio": 1.2}, r"head_ratio must be in \[0, 1\), got 1.2"),
        ({"head_dim_ratio": 1}, r"head_dim_ratio must be in \[0, 1\), got 1"),
        ({"ratios": {"conv*": 2.0}}, r"ratios\['conv\*'\] must be in \[0, 1\), got 2.0"),
        ({"max_ratio": 1.5}, r"max_ratio must be in \[0, 1\], got 1.5"),
        ({"criterion": "tailor"}, "criterion must be one of .*taylor.*, got 'tailor'"),
        ({"scope": "galactic"}, "scope must be one of local, global.*, got 'galactic'"),
        ({"reduction": "median"}, "reduction must be one of sum, mean, .*, got 'median'"),
        ({"normaliser": "l2"}, "normaliser must be one of none, .*, got 'l2'"),
        ({"min_width": 0}, "min_width must be a whole number from 1, got 0"),
        ({"round_to": 2.5}, "round_to must be a whole number from 1, got 2.5"),
        ({"steps": 0}, "steps must be a whole number from 1, got 0"),
    ],
)
def test_a_bad_option_is_refused_with_field_value_and_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RemoveChannels(**values)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_names_the_nearest_one() -> None:
    with pytest.raises(options.OptionError, match="remove-channels has no option 'ration'; did you mean 'ratio'"):
        options.make("remove-channels", {"ration": 0.5})


def test_a_model_without_a_removable_axis_says_what_freezes_it() -> None:
    program = capture(nn.Linear(4, 3), (torch.ones(2, 4),))
    with pytest.raises(
        PreconditionError, match=r"Linear has no axis that can be removed: every axis is frozen \(program"
    ):
        RemoveChannels()(program)
    empty = capture(nn.ReLU(), (torch.ones(2, 4),))
    with pytest.raises(PreconditionError, match="ReLU has no axis that can be removed: it has no parameters"):
        RemoveChannels()(empty)


@pytest.mark.parametrize("criterion", ["taylor", "taylor-multivariable", "hessian"])
def test_missing_calibration_is_refused_before_anything_changes(criterion: str) -> None:
    program = capture(filled(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))), (noise(2, 4),))
    version = program.version
    with pytest.raises(PreconditionError, match="needs calibration") as caught:
        Pipeline([RemoveChannels(criterion=criterion)])(program)
    assert program.version == version
    assert any("in pass remove-channels" in note for note in caught.value.__notes__)


def test_a_calibration_loss_that_is_nan_is_refused() -> None:
    model = filled(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    ctx = Context(loss=lambda p, x: p(x).sum() / 0 * 0, batches=[noise(2, 4)])
    with pytest.raises(PreconditionError, match="the calibration loss is nan for batch 0"):
        RemoveChannels(criterion="taylor")(capture(model, (noise(2, 4),)), ctx)


def test_gradient_criteria_without_anything_to_remove_need_no_calibration() -> None:
    program = capture(filled(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))), (noise(2, 4),))
    assert not RemoveChannels(ratio=0, criterion="taylor")(program).modified


def test_a_failing_step_leaves_the_program_as_it_was() -> None:
    model, x = filled(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))), noise(2, 4)
    program = capture(model, (x,))
    want, calls = program(x), []

    def loss(p: Any, batch: Tensor) -> Tensor:
        calls.append(1)
        return p(batch).sum() * (float("nan") if len(calls) == 2 else 1.0)

    with pytest.raises(PreconditionError, match="nan"):
        Pipeline([RemoveChannels(criterion="taylor", steps=2)])(program, Context(loss=loss, batches=[x]))
    assert len(calls) == 2
    assert torch.equal(program(x), want)
