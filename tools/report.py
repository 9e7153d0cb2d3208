"""The report of a run: what was done to the model, what came out, and what was refused; as data, JSON and HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .artifacts import size_of, stages_of
from .outputs import measured_speedup
from .pictures import data_uri
from .run import CAPTURE, LATENCY, ONNX, ONNX_ORIGINAL, SAMPLES, TORCHSCRIPT, Outcome
from .run_dir import Finished, pass_stage, write_atomic

FORMAT_VERSION = 1
JSON_FILE, HTML_FILE = "report.json", "report.html"
EXPORTS = (ONNX_ORIGINAL, ONNX, TORCHSCRIPT)


def write_report(outcome: Outcome) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` of a run, unless they are as they should be; return the data."""
    from .report_html import render

    data = report_data(outcome)
    pictures = {
        model["file"]: (outcome.directory / SAMPLES / model["file"]).read_bytes()
        for model in (data["samples"] or {"models": {}})["models"].values()
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    page = render(data, {name: data_uri(png) for name, png in pictures.items()})
    for name, content in ((JSON_FILE, text), (HTML_FILE, page)):
        write_atomic(outcome.directory / name, content)
    return data


def report_data(outcome: Outcome) -> dict[str, Any]:
    """Return the report of a run as plain data."""
    first = outcome[CAPTURE].result
    passes = [outcome[pass_stage(i, step.name)] for i, step in enumerate(outcome.recipe.passes)]
    after = passes[-1].result["cost"] if passes else first["cost"]
    return {
        "format_version": FORMAT_VERSION,
        "ok": outcome.ok,
        "failures": dict(outcome.failures),
        "recipe": {"name": outcome.recipe.name, **outcome.recipe.to_data()},
        "model": {
            **{key: first[key] for key in ("name", "inputs", "notes", "unknown")},
            # A run that an earlier release began does not say.
            "from_cache": first.get("from_cache", False),
        },
        "versions": first["versions"],
        "cost": {"before": first["cost"], "after": after},
        "groups": group_widths(first["groups"], [stage.result for stage in passes]),
        "frozen": first["frozen"],
        "passes": [{**stage.result, "seconds": stage.seconds} for stage in passes],
        "exports": {
            shown: {"directory": name, "bytes": size_of(outcome[name].result), **facts}
            for name in EXPORTS
            if name in outcome
            for shown, facts in stages_of(outcome[name].result, name).items()
        },
        "plan": _plan(passes, outcome),
        "latency": outcome[LATENCY].result if LATENCY in outcome else None,
        "samples": outcome[SAMPLES].result if SAMPLES in outcome else None,
        "stages": [{"name": stage.name, "seconds": stage.seconds} for stage in outcome.stages],
    }


def group_widths(groups: Sequence[Mapping[str, Any]], passes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every coupling group with its width before and after all passes, and what was wanted of it."""
    table: dict[str, dict[str, Any]] = {
        g["name"]: {
            **{key: g[key] for key in ("name", "kind", "exactness", "step", "members")},
            "before": g["size"],
            "wanted": g["size"],
            "after": g["size"],
        }
        for g in groups
    }
    for result in passes:
        for width in result["widths"]:
            row = table.setdefault(
                width["group"],
                {"name": width["group"], "kind": width["kind"], "exactness": "", "step": 1, "members": []}
                | {"before": width["before"]},
            )
            row |= {"wanted": width["wanted"], "after": width["after"]}
    return list(table.values())


def _plan(passes: Sequence[Finished], outcome: Outcome) -> dict[str, Any] | None:
    """Return the plan that the passes came to, with the speed-up that was measured of it."""
    plan = passes[-1].result.get("plan") if passes else None
    if plan is None:
        return None
    times = outcome[LATENCY].result["times"] if LATENCY in outcome else {}
    return {**plan, "measured_speedup": measured_speedup(plan, times)}
