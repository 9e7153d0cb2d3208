"""The report as one HTML page: no scripts, no other files, readable in a light and in a dark browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from .html_parts import bar, name, number, table, text
from .numbers import change, count
from .report_plan import plan_section


def render(data: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return the page of a report.

    Args:
        data: What `report.report_data` returned.
        pictures: ``data:`` address by file name of the samples.
    """
    css = files("graphwright.tools").joinpath("templates/report.css").read_text(encoding="utf-8")
    title = f"{data['recipe']['name'] or 'run'}: {data['model']['name']}"
    parts = [
        _head(data),
        _cards(data),
        _samples(data["samples"], pictures),
        plan_section(data["plan"]),
        _latency(data["latency"]),
        _exports(data["exports"]),
        _groups(data["groups"]),
        _passes(data["passes"]),
        _frozen(data["frozen"], data["model"]["unknown"]),
        _stages(data["stages"]),
        _origin(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _head(data: Mapping[str, Any]) -> str:
    recipe = data["recipe"]
    state = '<span class="good">every check passed</span>' if data["ok"] else '<span class="bad">a stage failed</span>'
    lines = [
        f"<h1>{escape(data['model']['name'])}</h1>",
        f"<p>recipe <code>{escape(recipe['name'])}</code>, model <code>{escape(recipe['model'])}</code>: {state}</p>",
    ]
    lines += [
        f'<p class="bad"><code>{escape(stage)}</code> failed: {escape(why)}</p>'
        for stage, why in data["failures"].items()
    ]
    lines += [f'<p class="soft">Capture: {escape(note)}</p>' for note in data["model"]["notes"]]
    return "\n".join(lines)


def _cards(data: Mapping[str, Any]) -> str:
    before, after = data["cost"]["before"], data["cost"]["after"]
    labels = {
        "parameters": "parameters",
        "total_macs": "multiply-accumulates, attention products included",
        "macs": "multiply-accumulates of weight layers",
        "activation_bytes": "bytes of activations",
    }
    cards = [
        f'<div class="card">{escape(label)}<b>{count(after[key])}</b>'
        f'<span class="soft">of {count(before[key])} ({change(before[key], after[key])})</span><br>'
        f"{bar(before[key], after[key], before[key])}</div>"
        for key, label in labels.items()
    ]
    return f'<div class="cards">{"".join(cards)}</div>\n<p class="soft">At the sizes of the example inputs.</p>'


def _samples(samples: Mapping[str, Any] | None, pictures: Mapping[str, str]) -> str:
    if samples is None:
        return ""
    figures = "".join(
        f'<figure><img src="{pictures[model["file"]]}" alt="samples of the {escape(label)} model">'
        f"<figcaption>{escape(label)}{_score(samples['score'], model['score'])}</figcaption></figure>"
        for label, model in samples["models"].items()
    )
    note = f'\n<p class="soft">{escape(samples["note"])}</p>' if samples["note"] else ""
    return f'<h2>Samples</h2>\n<div class="pictures">{figures}</div>{note}'


def _score(name: str, value: float | None) -> str:
    return "" if value is None else f": {escape(name)} {value:.2f}"


def _latency(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return ""
    times = latency["times"]
    slowest = max(t["median_ms"] for t in times.values())
    rows = [
        [text(label), number(t["median_ms"]), number(t["fastest_ms"]), number(t["slowest_ms"]), number(t["runs"])]
        + [("", bar(t["median_ms"], t["median_ms"], slowest))]
        for label, t in times.items()
    ]
    machine = latency["machine"]
    headers = [text("what ran")] + [("number", h) for h in ("median ms", "fastest", "slowest", "runs")] + [text("")]
    batch = "the example batch" if latency["batch"] is None else f"batch {latency['batch']}"
    return (
        f'<h2>Latency</h2>\n{table(headers, rows)}\n<p class="soft">In turns, {batch}, {latency["threads"]} thread(s), '
        f"{escape(str(machine['processor']))}, {machine['cores']} cores"
        f"{', ' + escape(machine['gpu']) if machine['gpu'] else ''}.</p>"
    )


def _exports(exports: Mapping[str, Mapping[str, Any]]) -> str:
    if not exports:
        return ""
    rows = []
    for label, manifest in exports.items():
        for check in manifest["checks"]:
            rows.append(
                [
                    name(label + "/"),
                    number(manifest["bytes"]),
                    text(check["inputs"]),
                    number(check["max_difference"]),
                    number(manifest["tolerance"]),
                    text(manifest.get("opset", "")),
                    text(", ".join(manifest.get("providers") or [])),
                ]
            )
    headers = [text("export"), ("number", "bytes"), text("compared on"), ("number", "difference")]
    headers += [("number", "allowed"), text("opset"), text("providers")]
    return (
        f"<h2>Exports</h2>\n{table(headers, rows)}\n"
        '<p class="soft">Largest difference of an output to the program, relative to the largest magnitude of it.</p>'
        + "".join(_remarks(label, manifest) for label, manifest in exports.items())
    )


def _remarks(label: str, manifest: Mapping[str, Any]) -> str:
    """Return what an export has to say beside its figures."""
    lines = list(manifest.get("notes") or [])
    lines += [f"asks of its inputs: {guard}" for guard in manifest.get("guards") or []]
    if manifest.get("opset_reason"):
        lines.append(f"opset {manifest['opset']}: {manifest['opset_reason']}")
    if manifest.get("precision", "float32") != "float32":
        lines.append(f"in {manifest['precision']}")
    return "".join(f'\n<p class="soft"><code>{escape(label)}/</code> {escape(str(line))}</p>' for line in lines)


def _groups(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return "<h2>Coupling groups</h2>\n<p>No axis of this model can be removed.</p>"
    largest = max(g["before"] for g in groups)
    rows = [
        [
            name(g["name"]),
            ("word", escape(str(g["kind"]))),
            text(g["exactness"]),
            number(len(g["members"])),
            number(g["before"]),
            number(g["after"]),
            ("", bar(g["before"], g["after"], largest)),
        ]
        for g in groups
    ]
    headers = [text("group"), text("kind"), text("removal is"), ("number", "tensors"), ("number", "before")]
    return f"<h2>Coupling groups</h2>\n{table([*headers, ('number', 'after'), text('')], rows)}"


def _passes(passes: Sequence[Mapping[str, Any]]) -> str:
    parts = ["<h2>Passes</h2>"] if passes else []
    for step in passes:
        stats = ", ".join(f"{escape(key.replace('_', ' '))} {count(value)}" for key, value in step["stats"].items())
        parts.append(f"<p><code>{escape(step['text'])}</code><br>{stats or 'changed nothing'}</p>")
        if step["skipped"]:
            rows = [[name(s["site"]), text(s["reason"])] for s in step["skipped"]]
            parts.append(
                f"<details><summary>{len(rows)} left as they were</summary>"
                f"{table([text('where'), text('why')], rows)}</details>"
            )
        if step.get("blocks"):
            parts.append(_blocks(step["blocks"]))
    return "\n".join(parts)


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            number(b["number"]),
            name(b["name"]),
            text(", ".join(b["kinds"])),
            text("" if b["score"] is None else f"{b['score']:.4g}"),
            text("removed" if b["removed"] else "stays"),
        ]
        for b in blocks
    ]
    headers = [("number", "number"), text("block"), text("holds"), text("score"), text("")]
    return f"<details><summary>{len(rows)} residual blocks</summary>{table(headers, rows)}</details>"


def _frozen(frozen: Sequence[Mapping[str, Any]], unknown: Sequence[str]) -> str:
    if not frozen:
        return ""
    reasons = Counter(f["reason"] for f in frozen)
    rows = [[text(reason), number(times)] for reason, times in reasons.most_common()]
    each = [[name(", ".join(f"{m['name']}[{m['dim']}]" for m in f["members"])), text(f["reason"])] for f in frozen]
    listed = table([text("tensors and dimensions"), text("reason")], each)
    note = f"<p>Operators without a rule: <code>{escape(', '.join(unknown))}</code></p>" if unknown else ""
    return f"<h2>Frozen axes</h2>\n{note}{table([text('reason'), ('number', 'axes')], rows)}" + (
        f"<details><summary>each of them</summary>{listed}</details>"
    )


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = [[name(stage["name"]), number(stage["seconds"])] for stage in stages]
    rows.append([text("all"), number(round(sum(stage["seconds"] for stage in stages), 1))])
    return f"<h2>Time</h2>\n{table([text('stage'), ('number', 'seconds')], rows)}"


def _origin(data: Mapping[str, Any]) -> str:
    recipe = yaml.safe_dump(dict(data["recipe"]), sort_keys=False, allow_unicode=True)
    versions = ", ".join(f"{escape(k)} {escape(v)}" for k, v in data["versions"].items())
    return (
        f"<h2>Recipe</h2>\n<details><summary>with every default</summary><pre>{escape(recipe)}</pre></details>\n"
        f'<p class="soft">{versions}</p>'
    )
