"""Reports: the figures are those of the run, and the page needs nothing but itself."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from graphwright.graph.serialize import load_program
from graphwright.tools.latency import measure, torch_threads
from graphwright.tools.numbers import change, count
from graphwright.tools.recipe import read_recipe
from graphwright.tools.report import group_widths, write_report
from graphwright.tools.report_html import render
from graphwright.tools.run import Outcome, Runner

Write = Callable[..., str]
VOID = {"meta", "br", "img", "rect"}


class Balance(HTMLParser):
    """Collects tags, and complains about what is opened and not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def outcome(tiny: Write, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    text = f"""
    model: {tiny()}
    passes:
      - remove-channels: {{ratio: 0.5, ignore: ["head.*"]}}
      - remove-dropout
    export: {{torchscript: true}}
    measure: {{runs: 3}}
    """
    return Runner(read_recipe(text, "tiny"), tmp_path_factory.mktemp("report") / "run")()


@pytest.fixture(scope="module")
def data(outcome: Outcome) -> dict[str, Any]:
    return write_report(outcome)


def test_the_figures_are_those_of_the_models(outcome: Outcome, data: dict[str, Any]) -> None:
    after = load_program(outcome.directory / "pass-1-remove-channels" / "program")
    assert data["cost"]["after"]["parameters"] == sum(p.numel() for p in after.parameters().values())
    # 3x3 convolutions 3 -> 6 -> 16 at 8x8, a linear layer 16 -> 5, for a batch of 2
    assert data["cost"]["after"]["total_macs"] == 2 * (64 * 6 * 27 + 64 * 16 * 54 + 80)
    assert data["cost"]["before"]["total_macs"] == 2 * (64 * 12 * 27 + 64 * 16 * 108 + 80)
    widths = {g["name"]: (g["before"], g["after"]) for g in data["groups"]}
    assert widths == {"first:channel": (12, 6), "second:channel": (16, 16)}
    (left,) = data["passes"][0]["skipped"]
    assert left["site"] == "second:channel" and "ratio is 0" in left["reason"]
    assert {g["exactness"] for g in data["groups"]} <= {"exact", "renormalised"}
    assert {f["reason"] for f in data["frozen"]} >= {"program output"}
    assert data["latency"]["times"]["result, PyTorch"]["runs"] == 3
    assert data["latency"]["threads"] == 1
    assert data["exports"]["torchscript"]["checks"]
    assert [stage["name"] for stage in data["stages"]] == [stage.name for stage in outcome.stages]


def test_the_json_file_holds_the_same(outcome: Outcome, data: dict[str, Any]) -> None:
    text = (outcome.directory / "report.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) == data


def test_the_page_needs_nothing_but_itself(outcome: Outcome, data: dict[str, Any]) -> None:
    page = (outcome.directory / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page)
    seen = parsed(page)
    tags = {tag for tag, _ in seen.seen}
    assert not tags & {"script", "link", "iframe", "object"}
    assert {"svg", "table", "style"} <= tags
    assert "prefers-color-scheme: dark" in page
    for _, attributes in seen.seen:
        assert not any(name.startswith("on") or name in ("href", "srcset") for name in attributes)
    for word in ("first:channel", "remove-channels{ignore=", "program output", "every check passed"):
        assert word in page


def test_writing_again_changes_nothing(outcome: Outcome, data: dict[str, Any]) -> None:
    files = [outcome.directory / name for name in ("report.json", "report.html")]
    before = [file.stat().st_mtime_ns for file in files]
    write_report(outcome)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_names_from_the_model_and_the_recipe_are_escaped(data: dict[str, Any]) -> None:
    evil = '<script>alert("x")</script>'
    changed = json.loads(json.dumps(data))
    changed["model"] |= {"name": evil, "notes": [evil], "unknown": [evil]}
    changed["recipe"] |= {"name": evil, "model": evil}
    changed["failures"] = {evil: evil}
    changed["ok"] = False
    changed["groups"][0] |= {"name": evil, "kind": evil}
    changed["passes"][0] |= {"text": evil, "skipped": [{"site": evil, "reason": evil}]}
    changed["frozen"][0] |= {"reason": evil}
    changed["versions"] = {evil: evil}
    changed["latency"]["times"][evil] = changed["latency"]["times"]["result, PyTorch"]
    changed["latency"]["machine"]["gpu"] = evil
    changed["samples"] = {
        **{"models": {evil: {"score": 1.0, "file": "a.png"}}, "score": evil, "note": evil},
    }
    page = render(changed, {"a.png": "data:image/png;base64,AAAA"})
    assert "<script" not in page
    assert "a stage failed" in page
    assert sum(evil in word for word in parsed(page).words) >= 10


def test_widths_of_several_passes_are_chained() -> None:
    groups = [{"name": "g", "kind": "channel", "exactness": "exact", "step": 1, "members": [1], "size": 16}]
    first = {"widths": [{"group": "g", "kind": "channel", "before": 16, "wanted": 12.0, "after": 12}]}
    second = {
        "widths": [
            {"group": "g", "kind": "channel", "before": 12, "wanted": 6.4, "after": 6},
            {"group": "new", "kind": "hidden", "before": 4, "wanted": 4.0, "after": 3},
        ]
    }
    rows = {row["name"]: row for row in group_widths(groups, [first, {"widths": []}, second])}
    assert (rows["g"]["before"], rows["g"]["after"]) == (16, 6)
    assert (rows["new"]["before"], rows["new"]["after"]) == (4, 3)


def test_numbers_read_well() -> None:
    assert count(701345) == "701,345"
    assert count(0.000123456) == "0.0001235"
    assert count(None) == ""
    assert change(100, 70) == "\N{MINUS SIGN}30.0 %"
    assert change(0, 5) == ""


def test_latency_is_measured_in_turns() -> None:
    order: list[str] = []
    times = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=4)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 4  # two warm-up runs each, then in turns
    assert times["a"]["runs"] == 4
    assert times["a"]["fastest_ms"] <= times["a"]["median_ms"] <= times["a"]["slowest_ms"]


def test_threads_are_set_inside_only() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1) as inside:
        assert inside == before + 1 == torch.get_num_threads()
    assert torch.get_num_threads() == before
