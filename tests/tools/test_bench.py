"""Benchmarks: what they count is right, and what they print and write is whole. No time is judged here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphwright.frontends import direct_trace
from graphwright.frontends.capture import capture
from graphwright.graph.errors import GraphwrightError
from graphwright.graph.verify import verify
from graphwright.tools.bench import depgraph, scale, timing
from graphwright.tools.bench.architectures import ARCHITECTURES, Subject
from graphwright.tools.bench.chains import chain, fit
from graphwright.tools.bench.llama import Llama, plan
from graphwright.tools.bench.pruners import ours, runs, theirs

pytestmark = pytest.mark.slow


class Attention(nn.Module):
    """Width 16, 4 heads of 4, as a projection's names tell Torch-Pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Small(nn.Module):
    """One attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(6, 16), Attention(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.attention(h))


def small() -> Subject:
    return Subject(Small().eval(), {"x": torch.randn(2, 7, 6)}, 4, ("last",))


# first 6*8 + 8; query, key and value 3 * (8*8 + 8) with two dims for each of the 4 heads; out 8*8 + 8; last 8*5 + 5
AFTER = 56 + 3 * 72 + 72 + 45


def test_both_prune_the_same_and_what_is_left_runs() -> None:
    subject = small()
    parts, module = ours(lambda: capture(subject.model, (), subject.inputs, {}))
    assert parts["parameters"] == AFTER and parts["groups"] == 4
    assert parts["total"] == pytest.approx(sum(parts[p] for p in ("capture", "analysis", "plan", "resize")))
    assert runs(module, subject.inputs) == "runs"
    assert sum(p.numel() for p in subject.model.parameters()) > 2 * AFTER  # the model itself is whole
    found, module = theirs(subject)
    assert found["parameters"] == AFTER and found["total"] == pytest.approx(found["init"] + found["step"])
    assert runs(module, subject.inputs) == "runs"


def test_a_module_that_does_not_run_is_said_to() -> None:
    x = torch.ones(2, 3)
    assert runs(nn.Linear(4, 2), {"input": x}) == "raises RuntimeError"
    linear = nn.Linear(3, 2)
    nn.init.constant_(linear.weight, float("nan"))
    assert runs(linear, {"input": x}) == "not finite"


def test_a_row_has_every_way_and_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []

    def counted(way: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            traced.append(f"{way} {type(model).__name__}")
            return original(model, *args, **kwargs)

        return trace

    monkeypatch.setattr(torch.export, "export", counted("any batch", torch.export.export))
    monkeypatch.setattr(direct_trace, "direct_trace", counted("one example", direct_trace.direct_trace))
    row = depgraph.measure(small(), 2, tmp_path)
    # Once for the cache, then twice each.
    assert Counter(traced) == {"one example Small": 3, "any batch Small": 2}
    assert {row[way]["parameters"] for way in ("ours", "cached", "theirs")} == {AFTER}
    assert {row[way]["module"] for way in ("ours", "cached", "theirs")} == {"runs"}
    assert row["any batch"]["capture"] > 0


def test_rows_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(depgraph, "ARCHITECTURES", {"small": small, "warm": depgraph.warm})
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    assert depgraph.main(["small", "--repeats", "1", "--json", str(tmp_path / "rows.json")]) == 0
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    header, titles, row = capsys.readouterr().out.splitlines()
    assert "1 thread" in header and "torch-pruning 1.6.1" in header and "median of 1" in header
    assert titles.split()[0] == "model" and row.split()[0] == "small" and row.split()[-1] == "runs"
    data = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert list(data["rows"]) == ["small"] and data["rows"]["small"]["ours"]["parameters"] == AFTER
    assert data["environment"]["threads"] == 1 and data["repeats"] == 1


@pytest.mark.parametrize("words", [["nonsense"], ["--repeats", "0"]])
def test_wrong_usage_of_depgraph_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        depgraph.main(words)
    assert caught.value.code == 2


def test_the_architectures_are_those_of_the_table() -> None:
    names = ["ResNet-50", "ConvNeXt-T", "ViT-B/16", "BERT-base", "Llama 12x512", "UNet2D DDPM", "SD 1.5 UNet"]
    assert list(ARCHITECTURES) == names


def test_repeats_are_interleaved_and_medians_taken() -> None:
    order: list[str] = []

    def run(name: str, values: Iterator[float]) -> timing.Parts:
        order.append(name)
        return {"part": next(values), "total": 1.0}

    a, b = iter([3.0, 1.0, 2.0]), iter([5.0, 9.0, 7.0])
    found = timing.interleaved({"a": lambda: run("a", a), "b": lambda: run("b", b)}, 3)
    assert order == ["a", "b"] * 3
    assert found == {"a": {"part": 2.0, "total": 1.0}, "b": {"part": 7.0, "total": 1.0}}


def test_a_stopwatch_adds_up_what_is_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 13.0, 16.5])
    monkeypatch.setattr(timing.time, "process_time", lambda: next(clock))
    watch = timing.Stopwatch()
    for part in ("plan", "resize", "plan"):
        watch.lap(part)
    assert watch.parts == {"plan": 4.5, "resize": 2.0} and watch.total == 6.5


def test_the_fit_finds_a_line_and_a_power() -> None:
    nodes = np.array([1_000, 5_000, 20_000])
    line = fit(nodes.tolist(), (nodes * 40e-6).tolist())
    assert (line.slope, line.r2, line.exponent) == pytest.approx((40, 1, 1))
    square = fit(nodes.tolist(), (nodes**2 * 1e-9).tolist())
    assert square.exponent == pytest.approx(2) and square.r2 < 0.99


def test_a_chain_verifies_and_one_axis_runs_through_it() -> None:
    program = chain(300)
    verify(program)
    groups = depgraph_groups(program)
    blocks = sum(name.endswith("conv1_weight:channel") for name in groups)
    # Per block: the inner channels, heads, head dims and value dims; and the one axis of all blocks.
    assert len(groups) == 4 * blocks + 1 and blocks >= 7
    # Per block 12 dimensions carry it: norms 4, convolutions 3, projections 3, out 2; and 3 of the ends.
    assert groups["first:channel"] == 12 * blocks + 3


def depgraph_groups(program: Any) -> dict[str, int]:
    from graphwright.graph.depgraph import depgraph as analyse

    return {g.name: len(g.members) for g in analyse(program).groups}


def test_a_llama_is_what_its_formulas_say(tmp_path: Path) -> None:
    tiny = Llama(layers=2, hidden=48, intermediate=56, kv_heads=4, group=2, qk_dim=8, v_dim=8, vocabulary=31)
    found = plan(tiny)
    assert {(kind, size): n for kind, size, n in found["groups"]} == tiny.groups()
    assert found["parameters"] == found["formula"] == sum(p.numel() for p in tiny.build().parameters())
    assert len(found["plans"]) == 2
    for made in found["plans"].values():
        assert made["parameters"] == made["formula"] < found["parameters"]


def test_scale_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(Llama(layers=1, hidden=48, intermediate=56, kv_heads=2, group=2, qk_dim=8, v_dim=8, vocabulary=9))
    monkeypatch.setattr(scale, "LLAMA", f"print({json.dumps(found)!r})".replace("{", "{{").replace("}", "}}"))
    words = ["--sizes", "100", "300", "--repeats", "1", "--json", str(tmp_path / "scale.json")]
    assert scale.main(words) == 0
    out = capsys.readouterr().out
    assert "microseconds a node" in out and "Llama, 1 layers" in out and "peak memory" in out
    data = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert len(data["chains"]["seconds"]) == 2 and data["llama"]["parameters"] == data["llama"]["formula"]
    assert scale.main(["--sizes", "100", "200", "--repeats", "1", "--no-llama"]) == 0
    with pytest.raises(SystemExit):
        scale.main(["--sizes", "100"])


def test_scale_fails_where_a_count_is_not_that_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(Llama(layers=1, hidden=48, intermediate=56, kv_heads=2, group=2, qk_dim=8, v_dim=8, vocabulary=9))
    found["plans"]["widths"]["parameters"] += 1
    monkeypatch.setattr(scale, "measure_llama", lambda: found)
    assert scale.main(["--sizes", "100", "200", "--repeats", "1"]) == 1


def test_a_process_of_the_llama_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "LLAMA", "raise SystemExit(3)")
    with pytest.raises(GraphwrightError, match="ended with code 3"):
        scale.measure_llama()
