"""The table of what recipes save: ratios of what their reports say, in the order of the names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graphwright.tools.bench import recipes


def report(factor: float) -> dict[str, Any]:
    def times(ms: float) -> dict[str, float]:
        return {"median_ms": ms, "fastest_ms": 0.5 * ms}

    return {
        "cost": {
            "before": {"parameters": 1000, "total_macs": 4000},
            "after": {"parameters": 500, "total_macs": 4000 * factor},
        },
        "latency": {
            "batch": 64,
            "threads": 1,
            "times": {
                "original, ONNX Runtime": times(10.0),
                "result, ONNX Runtime": times(6.0),
                "original, PyTorch": times(20.0),
                "result, PyTorch": times(16.0),
            },
        },
        "samples": {"models": {"original, ONNX Runtime": {"score": 1.0}, "result, ONNX Runtime": {"score": 2.25}}},
    }


def test_rows_are_ratios_of_the_result_to_the_original(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = recipes.row("one", report(0.25))
    assert (found["parameter_ratio"], found["mac_ratio"]) == (0.5, 0.25)
    assert found["latency_ratio, ONNX Runtime, median"] == 0.6
    assert found["latency_ratio, PyTorch, fastest"] == 0.8
    assert found["frechet"] == [1.0, 2.25]
    assert recipes.line(found) == ["one", "0.500", "0.250", "0.60 (0.60)", "0.80 (0.80)", "1.00 to 2.25"]
    monkeypatch.setattr(recipes, "run", lambda names, out: (recipes.row(name, report(0.25)) for name in names))
    assert recipes.main(["--names", "b,a", "--json"]) == 0
    assert [json.loads(text)["recipe"] for text in capsys.readouterr().out.splitlines()] == ["b", "a"]
    assert recipes.main(["--names", "b,a"]) == 0
    assert "Frechet distance" in capsys.readouterr().out
