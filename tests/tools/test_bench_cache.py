"""The benchmark of caches: what it counts, that its rows are whole, that it goes on where it was. No time is judged here."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.graph.cost import cost
from graphwright.graph.errors import LoadError
from graphwright.graph.schedules import warmed_up
from graphwright.tools.bench import cache as bench
from graphwright.tools.bench import (
    cache_bed,
    cache_cases,
    cache_contenders,
    cache_deepcache,
    cache_gpu,
    cache_hooks,
    cache_macs,
    cache_models,
    cache_onnx,
)
from graphwright.tools.bench.cache_bed import Bed, counting
from graphwright.tools.bench.cache_contenders import Contender, fewer_steps, ours
from graphwright.tools.bench.cache_diffusers import is_hooked, theirs
from graphwright.tools.bench.cache_models import TINY_SD, conditional
from graphwright.tools.bench.cache_rows import Row, Rows, cheapest_first, front
from graphwright.tools.bench.memory import peak_bytes

pytest.importorskip("diffusers")
pytest.importorskip("DeepCache")
pytest.importorskip("sklearn")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


# One layer a block, no attention outside the middle: captured in a moment. 4 branches.
SMALL: dict[str, Any] = TINY_SD | {
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
}


def small() -> nn.Module:
    return conditional(SMALL)


def test_the_published_averages_of_cifar_are_ours_to_half_a_percent() -> None:
    subject = next(s for s in cache_macs.SUBJECTS if s.name == "DDPM CIFAR-10")
    assert [f.branch for f in subject.figures] == [None, *[2] * 4, *range(12)]
    # Every branch is a cut of its own to make: the shallowest, that of table 2, and one that is known to differ.
    chosen = tuple(f for f in subject.figures if f.branch in (None, 0, 2, 6))
    full, *averages = cache_macs.rows_of(replace(subject, figures=chosen))
    assert full["holds"] and full["ours"] == pytest.approx(6.05, abs=0.01)
    different = [row for row in averages if not row["holds"]]
    assert all(abs(row["ratio"] - 1) <= 0.005 for row in averages if row["holds"]) and len(averages) == 7
    assert [row["what"] for row in different] == ["branch 6, N=5"]
    assert different[0]["ratio"] == pytest.approx(1.02, abs=0.002) and "unexplained" in different[0]["note"]


def test_a_figure_that_does_not_hold_is_said_to() -> None:
    subject = cache_macs.SUBJECTS[0]
    assert cache_macs._row(subject, "full", "", "100.0", 100.4, "G")["holds"]
    assert not cache_macs._row(subject, "full", "", "100.0", 100.6, "G")["holds"]
    assert cache_macs._row(subject, "full", "", "6.1", 6.051, "G")["holds"]  # what the printed digits hide


def test_averages_count_the_full_evaluations() -> None:
    assert cache_macs.average(10.0, 1.0, 10, 3) == pytest.approx((4 * 10 + 6 * 1) / 10)


def test_reuse_steps_cost_what_the_package_runs() -> None:
    figures = (cache_macs.Figure("a table", None, 1, "1.0"),)
    subject = cache_macs.Subject("small", small, (4, 8), 10, figures, context=(5, 12), reused=(0, 1))
    rows = {row["what"]: row for row in cache_macs.rows_of(subject)}
    for branch in (0, 1):
        assert rows[f"reuse, branch {branch}"]["ratio"] == pytest.approx(1, rel=1e-6)
    assert 0 < rows["reuse, branch 0"]["ours"] < rows["reuse, branch 1"]["ours"] < rows["full"]["ours"]
    assert rows["register, branch 0, float16"]["ours"] == pytest.approx(8 * 8 * 8 * 2 / 1e6)
    assert rows["reuse, branch 0, nodes"]["ours"] < rows["reuse, branch 1, nodes"]["ours"]


def test_side_by_side_pictures_are_equal_and_a_rerun_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    bed = cache_deepcache.SideBySide(SMALL, latent=8, steps=4)
    found = cache_deepcache.bench(Rows(file, {"load": 1}), bed, [0, 1], [2])
    assert [row["branch"] for row in found] == [0, 1]
    for row in found:
        assert row["equal"] and row["largest_value"] > 0.1 and row["full_evaluations"] == 2
        assert row["speedup"] > 0 and row["bound"] > 1 and row["kept_mb"] < row["their_kept_mb"]
        assert 20 < row["psnr"] < 200 and row["peak_mb"] is not None
    assert found[0]["mac_ratio"] < found[1]["mac_ratio"] < 1

    monkeypatch.setattr(cache_deepcache.SideBySide, "compare", None)
    monkeypatch.setattr(cache_deepcache.SideBySide, "uncached", None)
    assert cache_deepcache.bench(Rows(file, {"load": 2}), bed, [0, 1], [2]) == found
    assert json.loads(file.read_text(encoding="utf-8"))["environments"] == [{"load": 1}]


def test_the_attention_cache_of_diffusers_is_beside_them() -> None:
    bed = cache_deepcache.SideBySide(TINY_SD, latent=8, steps=4)
    (row,) = cache_deepcache.attention(Rows(None, {}), bed, [2])
    assert 1.05 < row["bound"] < 2
    assert row["seconds"] > 0 and 20 < row["psnr"] < 200
    assert not any(is_hooked(module) for module in bed.unet.modules())


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    def call() -> float:
        large = torch.ones(60_000_000, dtype=torch.uint8)
        return float(large[0])

    peak = peak_bytes(call)
    assert peak is None or 55e6 < peak < 90e6


def test_the_ratio_of_signal_to_noise_is_that_of_the_reference() -> None:
    reference = torch.tensor([0.0, 4.0])
    assert cache_deepcache.psnr(reference + 0.4, reference) == pytest.approx(20)
    assert cache_deepcache.psnr(reference, reference) is None


def test_plans_in_onnx_runtime_draw_what_they_draw_in_pytorch() -> None:
    pytest.importorskip("onnxruntime")
    bed = Bed("digits-ddpm", 4, 4)
    subject = cache_onnx.Subject(
        "digits-ddpm",
        4,
        lambda: bed.program,
        lambda m: cache_onnx._digits(bed, m),
        {"N=2": gw.InsertFeatureCache(2, 0)},
        repeats=1,
    )
    (row,) = cache_onnx.rows_of(subject, "N=2")
    full, reuse = (
        cost(stage.program).total_macs
        for stage in gw.Pipeline([gw.InsertFeatureCache()])(bed.program).plan.stages.values()
    )
    assert row["equal"] and row["from_uncached"] > 100 * row["max_difference"]
    assert row["bound"] == pytest.approx(2 * full / (full + reuse))
    assert row["speedup"] == pytest.approx(row["full_s"] / row["ours_s"]) and row["speedup"] > 1
    names = [
        "digits-ddpm, 64 digits",
        "digits-dit, 64 digits",
        "digits-dit, 256 digits",
        "SD 1.5 at quarter width",
        "DiT-S/2",
    ]
    assert [s.name for s in cache_onnx.subjects()] == names


def test_plans_of_a_transformer_with_labels_in_onnx_runtime() -> None:
    small = cache_onnx.Labels(cache_models.DIT_S_2 | {"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10}, 3)
    subject = cache_onnx.Subject(
        "tiny", 3, lambda: small.program, small.draw, {"N=2": gw.InsertLayerCache(interval_steps=2)}, repeats=1
    )
    (row,) = cache_onnx.rows_of(subject, "N=2")
    assert row["equal"] and row["from_uncached"] > 1e-3


def test_without_a_gpu_its_row_says_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = cache_gpu.bench(Rows(None, {}))
    assert row["note"] == "not measured: torch finds no GPU here" and "speedup" not in row and row["target"] == 2.2


def test_what_is_timed_on_a_gpu_samples_with_the_cache() -> None:
    """On the CPU, where the same code waits for nothing."""
    row = cache_gpu.measure(torch.device("cpu"), torch.float32, SMALL, latent=8, steps=6, repeats=1)
    assert row["speedup"] == pytest.approx(row["full_s"] / row["ours_s"])
    assert row["bound"] > 1.2 and 20 < row["psnr"] < 200 and row["holds"] == (row["speedup"] >= 2.2)


def test_learned_routers_are_contenders_on_transformers_with_labels() -> None:
    assert not [c for c in ours(tiny_bed()) if c.method == "LearnLayerCache"]
    bed = Bed("digits-dit", 6, 8)
    chosen = [c for c in ours(bed) if c.method == "LearnLayerCache"]
    assert [c.setting for c in chosen] == [f"one in {n} full, threshold {t}" for n in (2, 3) for t in (0.1, 0.9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_contenders, "ROUNDS", 2)
        drawn = [bed.draw(contender.make()) for contender in chosen[2:]]
    # A higher threshold takes more; nothing of the noise is random.
    assert drawn[1].macs <= drawn[0].macs < bed.uncached.macs
    assert drawn[0].error(bed.uncached) > 0


def test_pictures_that_differ_are_seen() -> None:
    zeros = torch.zeros(2)
    assert cache_deepcache._difference(zeros, zeros)["equal"]
    assert not cache_deepcache._difference(zeros + 2e-4, zeros)["equal"]


def test_a_case_says_what_becomes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_models, "TINY_SD", SMALL)
    found = cache_cases.rows_of("time passed by name")
    assert found == [
        {"case": "time passed by name", "theirs": "IndexError: tuple index out of range", "ours": "F--F--"}
    ]


def test_the_cases_are_those_of_the_table() -> None:
    assert len(cache_cases.CASES) == 12


@cache
def tiny_bed() -> Bed:
    return Bed("digits-ddpm", 6, 16)


def rows_of(contenders: list[Contender]) -> list[Row]:
    return [row for contender in contenders for row in cache_hooks.measure(tiny_bed(), contender)]


def test_the_counter_sees_attention_and_layers() -> None:
    bed = tiny_bed()
    inputs = bed.inputs(torch.zeros(2, 1, 8, 8), torch.tensor([5, 5]))
    total = cost(bed.program)
    with torch.no_grad(), counting() as counter:
        bed.program(**inputs)
    assert counter.get_total_flops() == 2 * total.total_macs and total.product_macs > 0


def test_our_caches_cost_less_and_an_interval_of_one_is_exact() -> None:
    bed = tiny_bed()
    assert len(ours(bed)) == 4 * (4 + 3) + (3 + 3) + 3
    wanted = ("DeepCache, branch 0, N=2", "DeepCache, branch 3, N=2", "InsertLayerCache, all branches, N=2")
    chosen = [c for c in ours(bed) if c.key in wanted]
    shallow, deep, layers = rows_of(chosen)
    assert shallow["mac_ratio"] < deep["mac_ratio"] < 1 and layers["mac_ratio"] < 1
    assert 0.001 < deep["error"] < shallow["error"]
    assert len({c.key for c in ours(bed)}) == len(ours(bed))
    exact = rows_of([Contender("graphwright", "none", "", lambda: bed.program)])[0]
    assert exact["mac_ratio"] == 1 and exact["error"] < 1e-5


def test_extrapolated_contenders_run_their_own_schedule_and_polynomial() -> None:
    bed = tiny_bed()
    assert warmed_up(12, 3).programs(12) == tuple("refresh" if i in (0, 1, 2, 4, 7, 10) else "reuse" for i in range(12))
    plan = gw.Pipeline([gw.InsertFeatureCache(branch=0)])(bed.program).plan
    plan.schedule = warmed_up(bed.steps, 2)
    last, line = (bed.draw(replace(plan, extrapolation=order).module()).pictures for order in (0, 1))
    assert float((line - last).abs().max()) > 0
    (contender,) = [c for c in ours(bed) if (c.method, c.setting) == ("DeepCache extrapolated", "branch 0, N=2")]
    assert torch.equal(bed.draw(contender.make()).pictures, line)


def test_hooks_of_diffusers_are_measured_or_their_refusal_is_a_row() -> None:
    chosen = {
        (c.method, c.setting): c
        for c in theirs(tiny_bed())
        if c.setting in ("threshold 0.25", "threshold 0.1", "every 2, all times", "order 1, N=2", "its own patterns")
    }
    found = {key: rows_of([c])[0] for key, c in chosen.items()}
    pyramid = found["PyramidAttentionBroadcast", "every 2, all times"]
    assert 0.8 < pyramid["mac_ratio"] < 1 and pyramid["error"] > 0
    assert "IndexError" in found["FirstBlockCache", "threshold 0.1"]["note"]
    assert "no repeated transformer blocks" in found["SeaCache", "threshold 0.25"]["note"]
    assert "hooks no layer" in found["TaylorSeer", "its own patterns"]["note"]
    assert found["TaylorSeer", "order 1, N=2"]["mac_ratio"] < 1


def test_a_transformer_with_labels_takes_every_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "sample_size": 8,
        "in_channels": 1,
    }

    def load(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = DiTTransformer2DModel(**sizes, out_channels=1, num_embeds_ada_norm=10).eval()
        return model, (torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2)), {}

    monkeypatch.setattr(cache_bed, "load_builtin", load)
    bed = Bed("any", 8, 4)
    assert bed.labelled and len(bed.inputs(torch.zeros(4, 1, 8, 8), torch.zeros(4))["class_labels"]) == 8
    contenders = [c for c in theirs(bed) if "its own patterns" not in c.key]
    last = {c.method: c for c in contenders} | {c.key: c for c in contenders if c.setting == "every 2, all times"}
    chosen = [*last.values(), *(c for c in ours(bed) if c.setting == "attention, N=2")]
    found = {contender.key: cache_hooks.measure(bed, contender)[0] for contender in chosen}
    assert len({row["method"] for row in found.values()}) == 7 and not any(row["note"] for row in found.values())
    # Attention at every second evaluation is one method under two names: a check of both ways and of the counter.
    a, b = found["PyramidAttentionBroadcast, every 2, all times"], found["InsertLayerCache, attention, N=2"]
    assert (
        a["mac_ratio"] == b["mac_ratio"] < 1 and a["error"] == pytest.approx(b["error"], rel=1e-4) and a["error"] > 1e-3
    )
    assert all(row["mac_ratio"] < 1 and row["error"] > 0 for row in found.values())


def row(who: str, ratio: float, error: float, **more: Any) -> Row:
    return {"who": who, "method": "m", "setting": "s", "mac_ratio": ratio, "error": error, "frechet": error} | more


def test_the_table_is_sorted_and_says_what_nothing_beats() -> None:
    rows = [
        row("a", 0.5, 2.0),
        {"who": "b", "note": "refused"},
        row("a", 0.2, 3.0),
        row("b", 0.5, 1.0),
        row("b", 0.6, 1.5),
    ]
    table = cheapest_first(rows)
    assert [r.get("mac_ratio") for r in table] == [0.2, 0.5, 0.5, 0.6, None]
    assert [table[i]["error"] for i in sorted(front(table, "error"))] == [3.0, 1.0]


def test_fewer_steps_are_interpolated_at_the_cost_of_a_cache() -> None:
    full: Row = {"who": "uncached", "mac_ratio": 1.0, "frechet": 0.5}
    rows = [full, row("fewer steps", 0.2, 4.0), row("fewer steps", 0.6, 2.0)]
    rows += [row("graphwright", 0.4, 2.5), row("diffusers", 0.8, 1.5), row("diffusers", 0.4, 2.4)]
    found = cache_hooks.beside_fewer_steps(rows)
    assert found[3]["steps_error"] == pytest.approx(3.0) and found[4]["steps_error"] == pytest.approx(1.0)
    assert "steps_error" not in found[1]
    said = cache_hooks.verdict(found)
    assert "error: graphwright beats fewer steps of the same cost in 1 of 1 settings" in said
    assert "error: diffusers beats fewer steps of the same cost in 1 of 2 settings" in said
    assert "error: diffusers has one as cheap and as good for 1 of 1 settings of graphwright" in said
    assert len(fewer_steps(tiny_bed())) > 2


def test_a_method_that_refuses_everywhere_is_one_row() -> None:
    refused = [{"method": "m", "setting": str(i), "note": "no"} for i in range(3)]
    assert cache_hooks._merged([row("a", 1.0, 0.0), *refused])[1:] == [
        {"method": "m", "setting": "every setting", "note": "no"}
    ]


def test_the_parts_print_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = cache_macs._row(cache_macs.SUBJECTS[0], "full", "a table", "10.0", 10.01, "G")
    monkeypatch.setattr(cache_macs, "SUBJECTS", cache_macs.SUBJECTS[:1])
    monkeypatch.setattr(cache_macs, "rows_of", lambda subject: [counted])
    monkeypatch.setattr(cache_hooks, "theirs", lambda bed: [])
    monkeypatch.setattr(cache_hooks, "ours", lambda bed: [])
    words = ["macs", "hooks", "--models", "digits-ddpm", "--steps", "4", "--count", "8"]
    assert bench.main([*words, "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert "1 thread" in out and "a table" in out and "1.0010" in out
    assert "digits-ddpm, 4 steps, 8 pictures" in out and "2 steps" in out and "fewer steps" in out
    assert set(json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["parts"]) == {"macs", "hooks"}


@pytest.mark.parametrize("words", [["nonsense"], ["--branches", "12"], ["--intervals", "1"], ["--latent", "9"]])
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(words)
    assert caught.value.code == 2


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for text in ("[]", "{", '{"rows": 1}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(LoadError, match="is no file of benchmark rows"):
            Rows(file, {})
