"""What the verbs of the command line do, once their options are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..frontends.cache import Captured
from ..graph.cost import cost
from ..graph.depgraph import depgraph
from ..graph.versions import versions_of
from ..passes import registry
from ..passes.base import Pipeline
from ..passes.options import options
from . import artifacts, render
from .calibration import context_of
from .facts import cost_facts, frozen_facts, group_facts, input_facts
from .outputs import load_output, output_cost, plan_facts
from .recipe import from_data, load_recipe
from .recipe_schema import Check, OnnxExport, Recipe
from .report import group_widths, write_report
from .run import Runner, seeded
from .source import load_source, program_folder

# What a feature needs beyond graphwright itself; ONNX has its own part of `doctor`.
EXTRAS = {"hf": ("transformers", "diffusers", "peft", "accelerate"), "digits": ("scikit-learn",)}


def print_json(data: Any) -> None:
    """Print data as JSON."""
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))


def recipe_of(name: str, passes: Sequence[str], settings: Sequence[str]) -> Recipe:
    """Return the recipe called ``name``, or with ``passes`` the one that applies them to the model ``name``."""
    if not passes:
        return load_recipe(name, settings)
    data = {"model": name, "passes": list(passes), "export": {"onnx": True}}
    label = name.rpartition(":")[2].rstrip("/").rpartition("/")[2] or "run"
    return from_data(data, label, settings)


def run(recipe: Recipe, out: Path, as_json: bool, quiet: bool, cache_dir: Path | None) -> bool:
    """Run a recipe and print its figures; return whether every stage was done."""
    watch = render.Watch(quiet)
    try:
        outcome = Runner(recipe, out, watch, cache_dir)()
    finally:
        watch.close()
    data = write_report(outcome)
    if as_json:
        print_json(data)
        return outcome.ok
    render.print_summary(data)
    render.print_lines(f"report: {out / 'report.html'}")
    return outcome.ok


def dry_run(recipe: Recipe, as_json: bool, quiet: bool, cache_dir: Path | None) -> None:
    """Print what the passes would do to every group, parameters and multiply-accumulates; write nothing."""
    watch = render.Watch(quiet)
    try:
        watch.begin("load", f"load and capture {recipe.model}")
        with seeded(recipe.seed):
            program, from_cache = load_source(recipe).capture(cache_dir)
            found = group_facts(depgraph(program))
            _note(from_cache, quiet)
            watch.begin("passes", "plan the passes")
            planned = [step for step in recipe.passes if not step.only_trains]
            result = Pipeline(planned)(program, context_of(recipe, watch.progress))
    finally:
        watch.close()
    widths = [{"widths": [vars(w) for w in getattr(r.result, "widths", ())]} for r in result.records]
    data = {
        "from_cache": from_cache,
        "cost": {"before": cost_facts(program), "after": output_cost(result.output)},
        "plan": plan_facts(result.output),
        "groups": group_widths(found, widths),
        "skipped": [{"site": s.site, "reason": s.reason} for s in result.skipped],
        "passes": [record.text for record in result.records],
    }
    if as_json:
        print_json(data)
        return
    rows = [[g["name"], g["kind"], g["exactness"], g["before"], g["after"]] for g in data["groups"]]
    render.print_table("planned widths", ["group", "kind", "removal is", "now", "planned"], rows, right=(3, 4))
    render.print_summary(data)


def program_of(source: str, cache_dir: Path | None, random_weights: bool = False) -> Captured:
    """Return the program that ``source`` names, captured if it is a model's."""
    return load_source(Recipe(model=source, random_weights=random_weights)).capture(cache_dir)


def _note(from_cache: bool, quiet: bool) -> None:
    if from_cache and not quiet:
        render.print_note(render.FROM_CACHE)


def groups(
    model: str,
    as_json: bool,
    frozen: bool,
    members: bool,
    random_weights: bool,
    quiet: bool,
    cache_dir: Path | None,
) -> None:
    """Print the coupling groups of a model."""
    program, from_cache = program_of(model, cache_dir, random_weights)
    _note(from_cache, quiet)
    graph = depgraph(program)
    data: dict[str, Any] = {
        "model": program.name,
        "inputs": input_facts(program),
        "notes": list(program.notes),
        "from_cache": from_cache,
        "cost": cost_facts(program),
        "groups": group_facts(graph),
        "unknown": list(graph.unknown),
    }
    if frozen:
        data["frozen"] = frozen_facts(graph)
    if as_json:
        print_json(data)
        return
    render.print_groups(data["groups"], members)
    if frozen:
        render.print_frozen(data["frozen"])
    if graph.unknown:
        render.print_lines(f"operators without a rule: {', '.join(graph.unknown)}")
    total = cost(program)
    render.print_lines(f"{program.name}: {total.parameters:,} parameters, {total.total_macs:,} multiply-accumulates")


def export(
    source: str,
    out: Path,
    kind: str,
    opset: int | None,
    fp16: bool,
    as_json: bool,
    quiet: bool,
    cache_dir: Path | None,
) -> None:
    """Export the program that ``source`` names."""
    if kind not in ("onnx", "torchscript"):
        raise typer.BadParameter(f"--to must be onnx or torchscript, got {kind!r}")
    if kind == "torchscript" and (opset is not None or fp16):
        raise typer.BadParameter("--opset and --fp16 are for ONNX")
    folder = program_folder(source)
    from_cache = False
    if folder is not None:
        output = load_output(folder)
    else:
        output, from_cache = program_of(source, cache_dir)
    _note(from_cache, quiet)
    if kind == "onnx":
        manifest = artifacts.export_onnx(output, out, OnnxExport(opset=opset, fp16=fp16), Check())
    else:
        manifest = artifacts.export_torchscript(output, out, Check())
    if as_json:
        print_json({**manifest, "from_cache": from_cache})
        return
    stages = artifacts.stages_of(manifest, str(out)).values()
    worst = max(check["max_difference"] for facts in stages for check in facts["checks"])
    render.print_lines(f"{out}: {', '.join(manifest['files'])}; differs from the program by {worst:.2g} at most")


def passes(as_json: bool) -> None:
    """Print every pass with its options."""
    data = {
        name: {
            "about": (cls.__doc__ or "").strip().partition("\n")[0],
            "options": [vars(option) for option in options(cls)],
        }
        for name in sorted(registry.names())
        for cls in [registry.load(name)]
    }
    if as_json:
        print_json(data)
        return
    for name, entry in data.items():
        render.print_lines(f"{name}: {entry['about']}")
        rows = [[f"  {o['name']}", o["type"], o["default"] or "(required)", o["about"]] for o in entry["options"]]
        if rows:
            render.print_table("", ["  option", "type", "default", ""], rows)


def doctor(as_json: bool) -> bool:
    """Print what is installed; return whether nothing is wrong."""
    from ..backends.onnx_runtime import doctor as examine

    facts = examine() | {"extras": _extras()}
    if as_json:
        print_json(facts)
        return not facts["problems"]
    rows = [[key.replace("_", " "), _words(value)] for key, value in facts.items() if key != "problems"]
    render.print_table("", ["", ""], rows)
    for problem in facts["problems"]:
        render.print_lines(f"problem: {problem}")
    render.print_lines("no problems found" if not facts["problems"] else "")
    return not facts["problems"]


def _extras() -> dict[str, str]:
    """Return, for each extra that is not about ONNX, its versions or how to install it."""
    found = {}
    for extra, packages in EXTRAS.items():
        versions = versions_of(packages)
        missing = [package for package in packages if package not in versions]
        found[extra] = ", ".join(f"{name} {version}" for name, version in versions.items())
        if missing:
            found[extra] = f"without {', '.join(missing)}: pip install 'graphwright[{extra}]'"
    return found


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def check(directory: Path, as_json: bool, quiet: bool) -> bool:
    """Check a directory; return whether all is well."""
    from .checking import examine

    findings = examine(directory)
    if as_json:
        print_json({"ok": all(f["ok"] for f in findings), "findings": findings})
    else:
        for finding in findings:
            if not (quiet and finding["ok"]):
                render.print_lines(f"{'ok ' if finding['ok'] else 'BAD'} {finding['what']}: {finding['found']}")
    return all(f["ok"] for f in findings)


__all__ = ["check", "doctor", "dry_run", "export", "groups", "passes", "recipe_of", "run"]
