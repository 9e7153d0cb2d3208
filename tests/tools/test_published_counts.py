"""Published sizes: exact where the settings fix them, and said not to be where they do not."""

from __future__ import annotations

import json

import pytest

from graphwright.tools.bench import published_counts
from graphwright.tools.bench.published_counts import Count, rows
from graphwright.tools.bench.published_networks import NETWORKS

pytestmark = pytest.mark.slow

pytest.importorskip("diffusers")


def test_diff_pruning_sizes_of_the_cifar_network_are_exact() -> None:
    (network,) = [n for n in NETWORKS if n.name == "DDPM CIFAR-10"]
    found = {r["setting"]: r for r in rows([network]) if r["unit"] == "M parameters"}
    # The specification of the published code's counts, to the last parameter.
    exact = {"dense": 35.746307, "0.2": 27.49659, "0.3": 19.851157, "0.4": 14.317624, "0.6": 8.594415}
    assert {name: row["ours"] for name, row in found.items()} == {n: round(v, 4) for n, v in exact.items()}
    assert [name for name, row in found.items() if not row["equal"]] == ["0.3"]  # printed cut, not rounded
    macs = [r["ratio"] for r in rows([network]) if r["unit"] == "G MACs"]
    assert all(0.99 < ratio <= 1.0 for ratio in macs)


@pytest.mark.parametrize(
    ("published", "values", "equal"),
    [("1.07", [1.0652], True), ("1.07", [1.0752], False), ("1.07", [1.05, 1.09], True), ("20", [20.4], True)],
)
def test_equality_is_at_the_printed_digits_or_inside_the_range_of_seeds(published, values, equal) -> None:
    row = Count("a", "b", "c", "M", published, sum(values) / len(values), values).data()
    assert row["equal"] is equal and ("range" in row) is (len(values) > 1)


def test_json_has_one_object_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = Count("a", "b", "c", "M", "1.0", 1.0).data()
    monkeypatch.setattr(published_counts, "rows", lambda: iter([row, row]))
    assert published_counts.main(["--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [row, row]
    assert published_counts.main([]) == 0
    assert "published" in capsys.readouterr().out
