"""What the benchmark of routers prints: counts of made-up routers, and multiply-accumulates by the paper's formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.tools.bench import learned_routers, routers
from graphwright.tools.bench.cache_bed import Bed

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


@pytest.mark.parametrize(
    ("evaluations", "attention", "mlp", "full", "routed"), [(50, 329, 335, 5.72, 4.36), (20, 123, 125, 2.29, 1.78)]
)
def test_the_published_counts_cost_what_the_paper_prints(
    evaluations: int, attention: int, mlp: int, full: float, routed: float, dit_xl: gw.Program
) -> None:
    """DiT-XL/2 with as many branches taken as by the published routers, within 1 % of Table 1.

    A sum of layers does not depend on which evaluations take them, so they are put where two programs are enough.
    """
    cheap = tuple(range(1, evaluations, 2))
    logits = torch.full((len(cheap), 56), 5.0)
    for kind, taken in ((0, attention), (1, mlp)):
        whole, rest = divmod(taken, 28)
        logits[:whole, kind::2] = -5
        logits[whole, kind : 2 * rest : 2] = -5
    router = gw.LayerRouter(evaluations, cheap, ("attention", "mlp") * 28, logits)
    assert router.removed() == {"attention": attention, "mlp": mlp}
    counted = routers.macs(dit_xl, router)
    assert counted.full / 1e12 == pytest.approx(full, rel=0.01)
    assert counted.routed / 1e12 == pytest.approx(routed, rel=0.01)


@pytest.fixture(scope="module")
def dit_xl() -> gw.Program:
    return routers.dit()


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


def test_learned_routers_are_counted_by_the_seeds_they_win() -> None:
    def row(router: str, seed: int, error: float, frechet: float) -> dict[str, Any]:
        return {
            "router": router,
            "seed": seed,
            "removed": 8,
            "mac_ratio": 0.5,
            "error": error,
            "pictures": 0.1,
            "frechet": frechet,
        }

    rows = [
        {"router": "no cache", "seed": 0, "frechet": 1.0},
        row("learned", 0, 1e-3, 1.1),
        row("uniform", 0, 2e-3, 1.2),
        row("learned", 1, 3e-3, 1.4),
        row("uniform", 1, 2e-3, 1.5),
        row("learned from pictures", 0, 5e-3, 1.0),
        row("learned from pictures", 1, 5e-3, 1.6),
    ]
    none, learned, uniform, pictured = learned_routers.summary(rows)
    assert none[5] == "1.000" and none[6:] == ["", "", "", "", ""]
    assert learned[4:] == ["0.1000 ± 0.0000", "1.250 ± 0.212", "", "", "", "0 of 2", "1 of 2"]
    assert uniform[6:] == ["1 of 2", "0 of 2", "2 of 2", "0 of 2", "1 of 2"] and uniform[3] == "2.0e-03 to 2.0e-03"
    assert pictured[6:] == ["2 of 2", "0 of 2", "1 of 2", "", ""]


def test_a_seed_gives_a_row_for_every_router(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(learned_routers, "ROUNDS", 1)
    monkeypatch.setattr(learned_routers, "PICTURE_ROUNDS", 1)
    monkeypatch.setattr(learned_routers, "RANDOM", 2)
    monkeypatch.setattr(learned_routers, "DRAWN", 2)
    rows = learned_routers.seed_rows(Bed("digits-dit", 4, 16), 0)
    names = [
        "no cache",
        "learned",
        "learned from pictures",
        "least change",
        "uniform",
        "top-down",
        "bottom-up",
        "random, mean",
    ]
    assert [row["router"] for row in rows] == [*names, "random, best of 2"]
    drawn = rows[1:-1]
    assert len({row["removed"] for row in drawn}) == 1 and 0 < drawn[0]["removed"] < drawn[0]["of"] == 24
    assert all(row["error"] > 0 and 0 < row["mac_ratio"] < 1 and row["pictures"] > 0 for row in drawn)
