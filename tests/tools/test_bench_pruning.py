"""The benchmarks of pruning, on little of everything: rows are measured, kept in files, and make the tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.tools.bench import diffusion_pruning, pruning, pruning_peer, pruning_subjects
from graphwright.tools.bench.pruning_models import (
    Crepe,
    DigitViT,
    estimated_pitch,
    pitch_accuracy,
    pitch_targets,
    tones,
)

pytestmark = pytest.mark.slow

sklearn = pytest.importorskip("sklearn")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CONTENDERS", (pruning.Contender("taylor"), pruning.Contender("bn-scale")))
    monkeypatch.setattr(pruning, "SCOPES", ("local", "global"))
    monkeypatch.setattr(pruning, "KEPT", (0.5,))


def test_rows_say_what_is_left_of_accuracy_and_cost(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_subjects, "RESNET", replace(pruning_subjects.RESNET, steps=80))
    file = tmp_path / "rows.json"
    assert pruning.main(["--subjects", "resnet", "--seeds", "1", "--out", str(file), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["criterion"], r["scope"]) for r in rows] == [
        ("taylor", "local"),
        ("taylor", "global"),
        ("bn-scale", "local"),
        ("bn-scale", "global"),
    ]
    for row in rows:
        assert 0.4 < row["mac_ratio"] <= 0.5 and row["dense"] > 0.8
        assert row["after_removal"] < row["after_recovery"]
    # The second time the rows are those of the file.
    assert pruning.main(["--subjects", "resnet", "--seeds", "1", "--out", str(file)]) == 0
    told = capsys.readouterr()
    assert "from " in told.err and "taylor" in told.out and f"{100 * rows[0]['after_recovery']:.1f}" in told.out


def test_what_a_criterion_cannot_score_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    program = pruning_subjects.capture(DigitViT().eval(), (torch.randn(2, 1, 8, 8),))
    bed = pruning_subjects.Bed(program, DigitViT(), pruning_subjects.Context(), {}, lambda m: 1.0, 1.0)
    row = pruning.measured(bed, pruning.Contender("bn-scale").removal("local", 0.5, 0, bed))
    assert "no batch norm" in row["refused"]
    found = [{"subject": "vit", "criterion": "bn-scale", "scope": "local", "kept": k, **row} for k in pruning.KEPT]
    line = next(line for line in pruning.summary(found, "vit") if line[:2] == ["bn-scale", "local"])
    assert line[2] == "refused"


def test_an_unknown_subject_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pruning.main(["--subjects", "alexnet"])
    assert "there is no subject alexnet; known: resnet, vit, crepe" in capsys.readouterr().err


def test_pitches_come_back_from_what_the_network_is_trained_on() -> None:
    sound, pitch = tones(50, torch.Generator().manual_seed(0))
    assert sound.shape == (50, 1024) and float(pitch.min()) > 60 and float(pitch.max()) < 1200
    assert torch.allclose(sound.mean(1), torch.zeros(50), atol=1e-5) and torch.allclose(sound.std(1), torch.ones(50))
    targets = pitch_targets(pitch)
    logits = torch.logit(targets.clamp(1e-6, 1 - 1e-6))
    assert float((1200 * torch.log2(estimated_pitch(logits) / pitch)).abs().max()) < 3
    assert pitch_accuracy(logits, pitch) == 1.0
    assert pitch_accuracy(logits, pitch * 2 ** (60 / 1200)) == 0.0
    # The strongest frequency of a tone is a multiple of its pitch.
    spectrum = torch.fft.rfft(sound * torch.hann_window(1024)).abs()
    strongest = spectrum.argmax(1) * 16000 / 1024
    assert float((strongest / pitch - (strongest / pitch).round()).abs().mul(pitch).max()) < 16
    assert Crepe()(sound[:2]).shape == (2, 360)


def test_a_diffusion_model_is_judged_before_and_after_fine_tuning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders = (diffusion_pruning.CONTENDERS[0], diffusion_pruning.CONTENDERS[7])
    monkeypatch.setattr(diffusion_pruning, "CONTENDERS", contenders)
    monkeypatch.setattr(diffusion_pruning, "PICTURES", 12)
    monkeypatch.setattr(diffusion_pruning, "STEPS", 4)
    monkeypatch.setattr(diffusion_pruning, "BATCH", 8)
    monkeypatch.setattr(diffusion_pruning, "STRIDE", 100)
    monkeypatch.setattr(diffusion_pruning, "FINE_TUNING", {"steps": 20, "learning_rate": 1e-3})
    file = tmp_path / "rows.json"
    assert diffusion_pruning.main(["--seeds", "1", "--out", str(file), "--json"]) == 0
    dense, random, ours = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert dense["before"]["ssim"] == pytest.approx(1)
    assert random["mac_ratio"] == ours["mac_ratio"] == pytest.approx(0.56, abs=0.01)
    assert random["timesteps"] == 0 and 2 < ours["timesteps"] < 10
    for row in (random, ours):
        assert dense["before"]["loss"] < row["after"]["loss"] < row["before"]["loss"]
        assert 0 < row["after"]["ssim"] < 1 and all(math.isfinite(v) for v in row["after"].values())
    lines: list[list[Any]] = diffusion_pruning.summary([dense, random, ours])
    assert [line[0] for line in lines] == ["dense", "random", "Diff-Pruning, threshold 0.05"]


def test_the_same_criterion_by_both_is_compared_seed_by_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(pruning_subjects, "RESNET", replace(pruning_subjects.RESNET, steps=20))
    file = tmp_path / "rows.json"
    command = ["--subjects", "resnet", "--seeds", "2", "--criteria", "magnitude-l2,fpgm", "--no-recovery"]
    assert pruning_peer.main([*command, "--out", str(file), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["criterion"], r["scope"]) for r in rows[:4]] == [
        (criterion, scope) for criterion in ("magnitude-l2", "fpgm") for scope in ("local", "global")
    ]
    assert len(rows) == 8 and all(r["ours"] == r["theirs"] for r in rows if r["criterion"] == "magnitude-l2")
    assert all(set(r["ours"]) == {"mac_ratio", "after_removal"} for r in rows)
    assert pruning_peer.main([*command, "--out", str(file)]) == 0
    assert "ours - theirs" in (table := capsys.readouterr().out) and "+0.0 ± 0.0" in table
    lines = {tuple(line[:2]): line for line in pruning_peer.summary(rows)}
    pairs = [
        100 * (r["ours"]["after_removal"] - r["theirs"]["after_removal"]) for r in rows if r["criterion"] == "fpgm"
    ]
    mean, error = (pairs[0] + pairs[2]) / 2, abs(pairs[0] - pairs[2]) / 2
    assert lines["fpgm", "local"][-1] == f"{mean:+.1f} ± {error:.1f}"


def test_an_unknown_criterion_of_both_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pruning_peer.main(["--criteria", "fgpm"])
    assert "there is no criterion fgpm; known: random, " in capsys.readouterr().err
