"""What the benchmark of routers prints: counts of made-up routers, and multiply-accumulates by the paper's formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.tools.bench import routers

pytestmark = pytest.mark.slow

TOKENS, WIDTH = 256, 1152
ATTENTION, MLP = 4 * TOKENS * WIDTH**2, 8 * TOKENS * WIDTH**2


def test_a_run_of_dit_xl_costs_what_the_formulas_say() -> None:
    """Two blocks of DiT-XL/2: attention is 4 N D^2, feed-forward 8 N D^2, and what is taken is saved in whole."""
    program = routers.dit(num_layers=2)
    logits = torch.tensor([[-5.0, 5, 5, -5], [-5, -5, -5, -5]])
    router = gw.LayerRouter(5, (1, 3), ("attention", "mlp") * 2, logits)
    counted = routers.macs(program, router)
    assert counted.full == 5 * gw.cost(program).macs
    assert counted.full > 5 * 2 * (ATTENTION + MLP)
    # Query, key and value, the output, and both feed-forward layers; the maps of times and classes stay.
    assert counted.full - counted.routed == 3 * ATTENTION + 3 * MLP


def test_a_row_a_router_and_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {f"{i}.prob": torch.tensor([-5.0, 1.0, 3.0, -1.0]) for i in range(8)}
    torch.save({"routers": rows}, tmp_path / "published.pt")
    gw.import_router(rows).save(tmp_path / "own.safetensors")
    files = [str(tmp_path / "published.pt"), str(tmp_path / "own.safetensors")]
    assert routers.main([*files, "--threshold", "0.1", "--threshold", "0.8", "--json", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and "4/16" in printed[1] and "12/16" in printed[2] and "3/12" in printed[3]
    found = json.loads((tmp_path / "r.json").read_text())["published.pt"]
    # sigmoid: 0.007, 0.731, 0.953, 0.269
    assert [row["removed"] for row in found] == [4, 12]
    assert (found[1]["attention"], found[1]["mlp"], found[1]["patterns"]) == (0.5, 1.0, 1)
    assert found[1]["of_all_evaluations"] == 12 / 32
    assert found[1]["removed_by_evaluation"] == {"1": 3, "3": 3, "5": 3, "7": 3}


def test_what_is_no_router_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "none.pt")], "there is no file"),
        (["x.pt", "--threshold", "1"], "--threshold must lie between 0 and 1"),
    ):
        with pytest.raises(SystemExit):
            routers.main(arguments)
        assert message in capsys.readouterr().err
