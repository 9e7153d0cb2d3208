"""One pass of a run: what it leaves in its directory, and what the report says of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..graph.program import Program
from ..graph.resize import RemovalRecord
from ..passes.base import Context, Pass, Pipeline
from ..passes.text import show
from .outputs import Output, output_cost, plan_facts
from .run_dir import Finished

REMOVAL = "removal.json"


def run_pass(step: Pass, before: Output, context: Context, folder: Path) -> tuple[Output, dict[str, Any]]:
    """Apply a pass; write its removal record to ``folder`` if it has one.

    Returns:
        What came out, and plain data for the report.

    Raises:
        GraphwrightError: The pass refuses, or fails.
    """
    result = Pipeline([step])(before, context)
    found = result.records[0].result
    if found.removal is not None:
        text = json.dumps(found.removal.to_json(), separators=(",", ":"))
        (folder / REMOVAL).write_text(text + "\n", encoding="utf-8")
    return result.output, {
        "name": step.name,
        "text": show(step),
        "modified": found.modified,
        "stats": dict(found.stats),
        "skipped": [{"site": s.site, "reason": s.reason} for s in found.skipped],
        "widths": [vars(width) for width in getattr(found, "widths", ())],
        "blocks": [vars(block) for block in getattr(found, "blocks", ())],
        "classes": [list(members) for members in getattr(found, "classes", ())],
        "regrouped": [vars(norm) for norm in getattr(found, "regrouped", ())],
        "cost": output_cost(result.output),
        "plan": plan_facts(result.output),
    }


def removal_so_far(out: Path, stages: Iterable[Finished]) -> RemovalRecord:
    """Return what the finished passes of a run removed from the captured program."""
    total = RemovalRecord()
    for stage in stages:
        if REMOVAL in stage.files:
            record = json.loads((out / stage.name / REMOVAL).read_text(encoding="utf-8"))
            total = total.then(RemovalRecord.from_json(record))
    return total


def program_or_none(output: Output) -> Program | None:
    """Return the output if it is a program."""
    return output if isinstance(output, Program) else None
