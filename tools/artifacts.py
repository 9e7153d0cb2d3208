"""Where the command line meets the backends: export a program, and call what was exported like the program."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from .outputs import Output
from .recipe_schema import Check, OnnxExport

Call = Callable[..., Any]


def export_onnx(output: Output, directory: Path, options: OnnxExport, check: Check) -> dict[str, Any]:
    """Export to ONNX, compared in ONNX Runtime before this returns; return the manifest.

    Raises:
        GraphwrightError: It cannot be exported, or the file computes something else.
    """
    from ..backends.onnx_export import export_onnx as export

    artifact = export(
        output,
        directory,
        opset=options.opset,
        fp16=options.fp16,
        providers=options.providers,
        tolerance=check.tolerance,
        fp16_tolerance=options.fp16_tolerance,
        second_shape=check.second_shape,
    )
    return dict(artifact.manifest)


def export_torchscript(output: Output, directory: Path, check: Check) -> dict[str, Any]:
    """Export to TorchScript, compared before this returns; return the manifest.

    Raises:
        GraphwrightError: It cannot be exported, or the file computes something else.
    """
    from ..backends.torchscript import export_torchscript as export

    return dict(export(output, directory, tolerance=check.tolerance).manifest)


def read_facts(directory: Path) -> dict[str, Any]:
    """Return the manifest of the export in ``directory``, empty if it holds none."""
    from ..backends import onnx_runner, torchscript

    for backend in (onnx_runner, torchscript):
        try:
            manifest = json.loads((directory / backend.MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict) and manifest.get("kind") in (backend.KIND, backend.PLAN_KIND):
            return manifest
    return {}


def kind_of(directory: Path) -> str | None:
    """Return which kind of export ``directory`` holds, None if it holds none."""
    return read_facts(directory).get("kind")


def load_call(
    directory: Path,
    threads: int | None = None,
    providers: tuple[str, ...] | None = None,
    stage: str | None = None,
) -> Call:
    """Load the export in ``directory``; what is returned takes the program's arguments.

    It gives the program's output tensors; an exported plan gives the denoiser's result.

    Args:
        directory: Of the export.
        threads: For the operators of ONNX Runtime's CPU provider.
        providers: Execution providers of ONNX Runtime.
        stage: Of a plan: this stage by itself.

    Raises:
        GraphwrightError: The directory holds no complete export.
    """
    from ..backends import onnx_export, onnx_runner, torchscript

    kind = kind_of(directory)
    if kind in (torchscript.PLAN_KIND, onnx_runner.PLAN_KIND):
        if kind == torchscript.PLAN_KIND:
            plan = torchscript.load_torchscript_plan(directory)
        else:
            plan = onnx_export.load_onnx_plan(directory, providers, threads=threads)
        return plan.module() if stage is None else plan.stage(stage).program
    runner: Any
    if kind == torchscript.KIND:
        runner = torchscript.TorchScriptRunner(directory)
    else:
        runner = onnx_runner.OnnxRunner(directory, providers, threads=threads)

    def call(*args: Any, **kwargs: Any) -> Any:
        # An export takes tensors alone: everything else is a constant of the capture.
        return runner(*(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

    return call


def stages_of(manifest: Mapping[str, Any], name: str) -> dict[str, Mapping[str, Any]]:
    """Return what a manifest says of each compared file, by a name for it: of a plan ``NAME/STAGE``."""
    if "stages" not in manifest:
        return {name: manifest}
    return {f"{name}/{stage}": facts for stage, facts in manifest["stages"].items()}


def size_of(manifest: Mapping[str, Any]) -> int:
    """Return the bytes of an export's files."""
    return sum(int(facts["bytes"]) for facts in manifest["files"].values())
