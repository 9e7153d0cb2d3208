"""What a report says of a plan: stages with their cost, the speed-up, a map of what is kept when, and every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from .html_parts import name, number, table, text
from .numbers import count

CELL, LABEL_WIDTH, LETTER = 14, 180, 7
# More registers than this are counted, not drawn.
MOST_ROWS = 64


def plan_section(plan: Mapping[str, Any] | None) -> str:
    """Return the section of a plan; empty for None.

    Args:
        plan: `outputs.plan_facts`, with ``measured_speedup``.
    """
    if plan is None:
        return ""
    full = plan["stages"]["refresh"]["cost"]["total_macs"]
    rows = [
        [
            name(stage),
            number(round(100 * plan["shares"].get(stage, 0.0), 1)),
            number(facts["cost"]["total_macs"]),
            number(round(100 * facts["cost"]["total_macs"] / full, 1) if full else None),
            number(facts["cost"]["parameters"]),
            text(", ".join(facts["reads"]) if len(facts["reads"]) <= 3 else f"{len(facts['reads'])} registers"),
        ]
        for stage, facts in plan["stages"].items()
    ]
    headers = [
        text("stage"),
        ("number", "% of evaluations"),
        ("number", "multiply-accumulates"),
        ("number", "% of full"),
    ]
    headers += [("number", "parameters"), text("takes")]
    speed = f"Bound by multiply-accumulates: {plan['predicted_speedup']:.2f} times as fast as without the cache."
    measured = "".join(
        f" Measured in {escape(runtime)}: {value:.2f} times." for runtime, value in plan["measured_speedup"].items()
    )
    kept = sum(plan["registers"].values())
    notes = "".join(f"<br>{escape(note)}" for note in plan["notes"][:8])
    return (
        f"<h2>Plan</h2>\n<p>{speed}{measured}</p>\n{table(headers, rows)}\n{schedule_map(plan)}\n{evaluations(plan)}\n"
        f'<p class="soft">{len(plan["registers"])} kept tensors of {count(kept)} bytes at the example\'s sizes.{notes}</p>'
    )


def evaluations(plan: Mapping[str, Any]) -> str:
    """Return a table with a row for each evaluation: what it takes by kind, what it computes, and how fast that is."""
    stages = plan["stages"]
    full = stages["refresh"]["cost"]["total_macs"]
    kinds = list(dict.fromkeys(kind for facts in stages.values() for kind in facts.get("taken", {})))
    headers = [("number", "evaluation"), text("stage"), *(("number", f"{kind} taken") for kind in kinds)]
    headers += [("number", "multiply-accumulates"), ("number", "times as fast")]
    rows = []
    for i, stage in enumerate(plan["ran"]):
        facts = stages[stage]
        macs = facts["cost"]["total_macs"]
        taken = [number(facts.get("taken", {}).get(kind, 0)) for kind in kinds]
        rows.append([number(i), name(stage), *taken, number(macs), number(round(full / macs, 2) if macs else None)])
    return f"<details><summary>Every evaluation</summary>\n{table(headers, rows)}\n</details>"


def schedule_map(plan: Mapping[str, Any]) -> str:
    """Return the schedule as inline SVG: a row for each kept tensor, a column for each evaluation.

    A full cell was computed in that evaluation, an empty one was taken from an earlier one.
    """
    ran, registers = plan["ran"], list(plan["registers"])[:MOST_ROWS]
    width, height = LABEL_WIDTH + CELL * len(ran), CELL * (len(registers) + 1)
    parts = []
    for row, register in enumerate(registers):
        top = row * CELL
        shown = escape(register[-(LABEL_WIDTH // LETTER) :])
        parts.append(f'<text class="label" x="{LABEL_WIDTH - 4}" y="{top + 11}" text-anchor="end">{shown}</text>')
        for column, stage in enumerate(ran):
            taken = register in plan["stages"][stage]["reads"]
            parts.append(
                f'<rect class="{"before" if taken else "after"}" x="{LABEL_WIDTH + column * CELL}" y="{top}" '
                f'width="{CELL - 1}" height="{CELL - 1}"><title>evaluation {column}, {escape(stage)}: '
                f"{escape(register)} {'taken' if taken else 'computed'}</title></rect>"
            )
    for column in range(0, len(ran), 5):
        x, y = LABEL_WIDTH + column * CELL, height - 2
        parts.append(f'<text class="label" x="{x}" y="{y}">{column}</text>')
    more = len(plan["registers"]) - len(registers)
    note = f" The first {len(registers)} of {len(plan['registers'])} kept tensors." if more else ""
    open_end = "" if plan["evaluations"] else " The schedule goes on like this."
    label = f"{len(ran)} evaluations, {ran.count('refresh')} of them full"
    return (
        f'<div class="wide"><svg class="map" width="{width}" height="{height}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(parts)}</svg></div>\n"
        f'<p class="soft">Evaluations of a run from left to right: {label}. Full: computed; pale: taken from before.'
        f"{note}{open_end}</p>"
    )
