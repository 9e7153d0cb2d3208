"""The coverage sweep on the odd cases and a few architectures; the whole zoo is `make sweep`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.resize import RemovalRecord, TensorCut
from graphwright.tools import sweep
from graphwright.tools.zoo import ZOO
from graphwright.tools.zoo.entry import Case, Entry
from graphwright.tools.zoo.inventory import unexplained

ODD = [name for name, entry in ZOO.items() if entry.family == "odd" and not entry.requires]
REAL = [
    "resnext",
    "lstm_bi_2",
    "llama_gqa",
    "bert",
    "vit",
    "convnext",
    "swin",  # patch merging and tables of relative positions, without a rule for either
    "gpt2",
    "shufflenet_v2",
    "unet_group",
    "mixtral",
]

# Refused with a reason that is right: there is no smaller module that equals the masked one.
REFUSED = {
    "wrong/flip": "its order is reversed",
    "wrong/roll": "its positions are rolled",
    "wrong/channel_conv": "spatial size",
    "wrong/softmax_channels": "softmax over it",
    "wrong/softmax_features": "softmax over it",
    "wrong/spatial_attention": "an extremum, order or product is taken over it",
}


@pytest.mark.parametrize("name", [*ODD, *REAL])
def test_removing_a_random_half_of_every_group_equals_the_mask_oracle(name: str) -> None:
    row = sweep.sweep_entry(ZOO[name])

    assert not row.skipped
    assert row.wrong == []
    assert row.raised == []
    assert row.inventory == []
    if name in REFUSED:
        assert row.groups == 0 and REFUSED[name] in row.frozen
    elif name != "lstm_bare":
        assert row.exact + row.renormalised > 0
        assert row.inert < row.exact + row.renormalised


def test_a_bound_on_single_groups_spreads_them_and_keeps_the_removal_of_all_at_once() -> None:
    case = ZOO["shufflenet_v2"].build()
    groups = depgraph(capture(case.model, case.args, case.kwargs, case.dynamic)).groups
    assert sweep.spread(groups, None) == sweep.spread(groups, len(groups)) == list(groups)
    assert sweep.spread(groups[:5], 2) == [groups[1], groups[3]]
    assert sweep.spread(groups, 0) == []
    some = sweep.sweep_entry(ZOO["shufflenet_v2"], singles=0)
    assert some.exact + some.renormalised == 1 and some.wrong == [] and some.raised == []


def test_rows_that_are_known_to_be_refused_exist() -> None:
    assert set(REFUSED) <= set(ODD)


def test_a_removal_of_other_indices_than_recorded_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(program, keep, graph=None):
        record = resize(program, keep, graph)
        tensors = {
            name: {d: TensorCut(tuple(sorted((i + 1) % cut.of for i in cut.kept)), cut.of) for d, cut in dims.items()}
            for name, dims in record.tensors.items()
        }
        return RemovalRecord(record.groups, tensors)

    resize = sweep.resize
    monkeypatch.setattr(sweep, "resize", shifted)
    row = sweep.sweep_entry(ZOO["works/residual_add"])
    assert row.wrong


def test_an_output_near_zero_is_no_agreement() -> None:
    assert sweep.difference([torch.zeros(3)], [torch.zeros(3)]) == float("inf")


@pytest.mark.parametrize("want", [float("nan"), float("inf")])
def test_an_oracle_that_is_not_finite_is_no_agreement(want: float) -> None:
    assert sweep.difference([torch.ones(3)], [torch.tensor([1.0, 1.0, want])]) == float("inf")


def test_a_model_that_cannot_be_captured_is_reported_as_raised() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    row = sweep.sweep_entry(Entry("branches", "test", lambda: Case(Branches(), (torch.randn(2, 3),), {}, None, None)))
    assert row.raised and row.raised[0].startswith("capture: CaptureError")


def test_a_missing_package_skips_with_its_name() -> None:
    entry = dataclasses.replace(ZOO["works/residual_add"], requires=("no_such_package",))
    assert "no_such_package" in sweep.sweep_entry(entry).skipped


def test_an_axis_that_the_inventory_has_and_the_analysis_does_not_offer_is_reported() -> None:
    case = ZOO["works/residual_add"].build()
    graph = depgraph(capture(case.model, case.args, case.kwargs, case.dynamic))
    assert unexplained("works/residual_add", graph) == []

    lost, *kept = graph.groups
    graph.__dict__["groups"] = tuple(kept)
    assert unexplained("works/residual_add", graph) == [f"1 missing of {lost.kind} {lost.size}, explained are 0"]
