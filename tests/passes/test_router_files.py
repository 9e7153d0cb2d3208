"""Published forms of routers, made up here: indices, rows that were never trained, and files that run code."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw

BRANCHES = 6


def vectors(total: int) -> dict[str, Tensor]:
    """Row ``i`` takes branch ``i % 6`` alone, by a wide margin; every logit of a row is known by its index."""
    rows = {}
    for i in range(total):
        row = torch.full((BRANCHES,), 5.0)
        row[i % BRANCHES] = -5.0 - i / 100
        rows[f"{i}.prob"] = row
    return rows


def dit_form(total: int, **more: Any) -> dict[str, Any]:
    """The form of DiT; the rows of full evaluations hold random numbers, as they were never trained."""
    rows = vectors(total)
    for i in range(1, total, 2):
        rows[f"{i}.prob"] = torch.randn(BRANCHES)
    return {"routers": rows, "opt": {"state": {}, "param_groups": []}, **more}


@pytest.mark.parametrize("total", [4, 10, 20])
def test_dit_counts_its_indices_from_the_clean_end(total: int) -> None:
    router = gw.import_router(dit_form(total), total, "dit")
    assert router.cheap == tuple(range(1, total, 2)) and router.threshold == 0.1
    for evaluation, taken in enumerate(router.reuse()):
        index = total - 1 - evaluation
        assert taken == ((index % BRANCHES,) if index % 2 == 0 else ())


def test_an_odd_run_of_dit_begins_with_a_full_evaluation() -> None:
    router = gw.import_router(dit_form(7))
    # Index 6 would be cheap and has no evaluation before it; 5 is full, 4 cheap.
    assert router.cheap == (2, 4, 6)
    assert [row.argmin().item() for row in router.logits] == [4, 2, 0]


@pytest.mark.parametrize(("total", "cheap"), [(20, 9), (50, 24), (8, 3)])
def test_uvit_has_a_vector_a_step_of_two_evaluations(total: int, cheap: int) -> None:
    rows = vectors(total)
    for i in [0, *range(total // 2, total)]:
        rows[f"{i}.prob"] = torch.full((BRANCHES,), float("nan"))  # never read
    router = gw.import_router(rows, total, "uvit")
    assert router.cheap == tuple(range(2, total, 2)) and len(router.cheap) == cheap and router.threshold == 0.9
    for evaluation in router.cheap:
        assert router.reuse()[evaluation] == (evaluation // 2 % BRANCHES,)


def test_the_kind_is_told_by_the_form() -> None:
    assert gw.import_router(dit_form(6)).settings["source"] == "published dit router"
    assert gw.import_router(vectors(6)).settings["source"] == "published uvit router"


def test_branches_are_attention_and_feed_forward_in_turn_unless_named() -> None:
    assert gw.import_router(dit_form(6)).kinds == ("attention", "mlp") * 3
    kinds = ("attention", "attention", "mlp") * 2
    router = gw.import_router(dit_form(6), kinds=kinds)
    assert router.kinds == kinds and sum(router.removed().values()) == 3
    with pytest.raises(gw.PreconditionError, match="6 branches, and kinds names 2"):
        gw.import_router(dit_form(6), kinds=("attention", "mlp"))


def test_a_file_is_read_with_its_arguments_but_not_its_paths(tmp_path: Path) -> None:
    arguments = argparse.Namespace(model="DiT-XL/2", l1=5e-6, lr=1e-3, data_path="/home/somebody", ckpt=None)
    torch.save(dit_form(10, args=arguments), tmp_path / "router.pt")
    router = gw.import_router(tmp_path / "router.pt", 10)
    assert router.settings == {"source": "published dit router", "model": "DiT-XL/2", "lam": 5e-6, "lr": 1e-3}
    torch.testing.assert_close(router.logits, gw.import_router(dit_form(10)).logits)


class Runs:
    """Would make a folder when it is unpickled by plain pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    torch.save(dit_form(10, args=Runs(tmp_path / "made")), tmp_path / "router.pt")
    with pytest.raises(gw.ArtifactError, match="holds more than tensors and plain data, which is not run"):
        gw.import_router(tmp_path / "router.pt")
    assert not (tmp_path / "made").exists()


def test_what_is_allowed_while_reading_is_not_afterwards(tmp_path: Path) -> None:
    torch.save(dit_form(4, args=argparse.Namespace(lr=1.0)), tmp_path / "router.pt")
    gw.import_router(tmp_path / "router.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (dit_form(10), {"evaluations": 20}, gw.PreconditionError, "for runs of 10 evaluations, got 20"),
        (dit_form(10), {"kind": "sit"}, gw.PreconditionError, "no published routers of kind 'sit'; known: dit, uvit"),
        ({"routers": {}}, {}, gw.ArtifactError, "holds no router"),
        ({"weight": torch.ones(3)}, {}, gw.ArtifactError, "'weight' is not a vector of logits"),
        ({"0.prob": torch.ones(3, 3)}, {}, gw.ArtifactError, "'0.prob' is not a vector"),
        ({"1.prob": torch.ones(3), "2.prob": torch.ones(3)}, {}, gw.ArtifactError, "not those from 0 on"),
        ({"0.prob": torch.ones(3), "1.prob": torch.ones(4)}, {}, gw.ArtifactError, "different lengths"),
        ({"0.prob": torch.ones(3)}, {}, gw.ArtifactError, "no cheap evaluation"),
        ("nowhere.pt", {}, gw.ArtifactError, "no file nowhere.pt"),
    ],
)
def test_what_is_no_such_router_is_refused(source: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        gw.import_router(source, **options)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "router.pt").write_bytes(b"no archive")
    with pytest.raises(gw.ArtifactError, match="damaged"):
        gw.import_router(tmp_path / "router.pt")
