"""What a run works on: a program, or the plan that a pass made of it. On disk, in figures, and as something to call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..graph.document_files import PLAN_FORM
from ..graph.plan import Plan
from ..graph.program import Program
from ..graph.schedules import REFRESH, Schedule, Uniform, speedup_bound
from ..graph.serialize import load_plan, load_program, save_plan, save_program
from ..passes.insert_layer_cache import register_kinds
from .facts import cost_facts

Output = Program | Plan
# Evaluations that a report shows of a schedule that goes on for ever.
SHOWN = 20


def save_output(output: Output, folder: Path) -> None:
    """Save a program or a plan to ``folder``."""
    if isinstance(output, Plan):
        save_plan(output, folder)
    else:
        save_program(output, folder)


def load_output(folder: Path) -> Output:
    """Load what `save_output` wrote.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    return load_plan(folder) if (folder / PLAN_FORM.file).is_file() else load_program(folder)


def programs_of(output: Output) -> dict[str, Program]:
    """Return the programs of a plan by stage, or the program itself under the name ``result``."""
    if isinstance(output, Plan):
        return {name: stage.program for name, stage in output.stages.items()}
    return {"result": output}


def denoiser_of(output: Output) -> Program:
    """Return the program whose inputs are those of the captured model."""
    return output.stages[REFRESH].program if isinstance(output, Plan) else output


def callable_of(output: Output) -> Callable[..., Any]:
    """Return what is called like the captured model."""
    return output.module() if isinstance(output, Plan) else output


def output_cost(output: Output) -> dict[str, int]:
    """Return the cost of a program, or of a plan the mean of an evaluation; parameters are those of all stages."""
    if not isinstance(output, Plan):
        return cost_facts(output)
    each = {name: cost_facts(stage.program) for name, stage in output.stages.items()}
    shares = stage_shares(output.schedule)
    facts = {
        key: round(sum(share * each[name][key] for name, share in shares.items()))
        for key in ("macs", "product_macs", "total_macs", "operators")
    }
    whole = {key: each[REFRESH][key] for key in ("parameters", "parameter_bytes")}
    return {**facts, **whole, "activation_bytes": max(facts["activation_bytes"] for facts in each.values())}


def stage_shares(schedule: Schedule) -> dict[str, float]:
    """Return the share of evaluations that each stage runs, over a run or over one round of an endless schedule."""
    ran = one_round(schedule)
    return {name: ran.count(name) / len(ran) for name in dict.fromkeys(ran)}


def one_round(schedule: Schedule) -> tuple[str, ...]:
    """Return the stages of a run, or of one round of an endless schedule."""
    count = schedule.evaluations
    if count is None:
        assert isinstance(schedule, Uniform), "only a uniform schedule has no end"
        count = schedule.interval * schedule.per_step
    return schedule.programs(count)


def plan_facts(output: Output) -> dict[str, Any] | None:
    """Return the schedule, stages and registers of a plan as plain data; None for a program.

    Of each stage ``taken`` counts by kind what it takes from an earlier evaluation.
    ``predicted_speedup`` is the bound that multiply-accumulates set: those of a full evaluation over the mean.
    """
    if not isinstance(output, Plan):
        return None
    kinds = register_kinds(output)
    stages = {
        name: {
            "reads": list(stage.reads),
            "writes": list(stage.writes),
            "taken": dict(Counter(kinds[register] for register in stage.reads)),
            "cost": cost_facts(stage.program),
        }
        for name, stage in output.stages.items()
    }
    shares = stage_shares(output.schedule)
    evaluations = output.schedule.evaluations
    return {
        "schedule": output.schedule.encode(),
        "evaluations": evaluations,
        "ran": list(output.schedule.programs(evaluations or SHOWN)),
        "shares": shares,
        "stages": stages,
        "registers": _register_bytes(output),
        "predicted_speedup": speedup_bound(output.macs(), one_round(output.schedule)),
        "notes": list(output.notes),
    }


def _register_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes of every register at the example's sizes."""
    found: dict[str, int] = {}
    for stage in plan.stages.values():
        for spec, value in zip(stage.program.inputs, stage.program.example, strict=True):
            if spec.name in stage.reads:
                found[spec.name] = value.numel() * value.element_size()
    return found


def measured_speedup(plan: Mapping[str, Any], times: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return by runtime how many times as fast a mean evaluation is as a full one, from the stages' medians.

    Args:
        plan: `plan_facts`.
        times: What `latency.measure` found, by ``STAGE, RUNTIME``.
    """
    found: dict[str, float] = {}
    for runtime in dict.fromkeys(label.rpartition(", ")[2] for label in times):
        medians = {name: times.get(f"{name}, {runtime}", {}).get("median_ms") for name in plan["shares"]}
        if None not in medians.values():
            mean = sum(share * float(medians[name] or 0.0) for name, share in plan["shares"].items())
            found[runtime] = float(medians[REFRESH] or 0.0) / mean
    return found
