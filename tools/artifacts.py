"""Where the command line meets the backends: export a program, and call what was exported like the program."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from ..graph.program import Program
from .recipe_schema import Check, OnnxExport

Call = Callable[..., Any]


def export_onnx(program: Program, directory: Path, options: OnnxExport, check: Check) -> dict[str, Any]:
    """Export to ONNX, compared in ONNX Runtime before this returns; return the manifest.

    Raises:
        GraphwrightError: It cannot be exported, or the file computes something else.
    """
    from ..backends.onnx_export import export_onnx as export

    artifact = export(
        program,
        directory,
        opset=options.opset,
        fp16=options.fp16,
        providers=options.providers,
        tolerance=check.tolerance,
        fp16_tolerance=options.fp16_tolerance,
        second_shape=check.second_shape,
    )
    return dict(artifact.manifest)


def export_torchscript(program: Program, directory: Path, check: Check) -> dict[str, Any]:
    """Export to TorchScript, compared before this returns; return the manifest.

    Raises:
        GraphwrightError: It cannot be exported, or the file computes something else.
    """
    from ..backends.torchscript import export_torchscript as export

    return dict(export(program, directory, tolerance=check.tolerance).manifest)


def read_facts(directory: Path) -> dict[str, Any]:
    """Return the manifest of the export in ``directory``, empty if it holds none."""
    from ..backends import onnx_runner, torchscript

    for backend in (onnx_runner, torchscript):
        try:
            manifest = json.loads((directory / backend.MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict) and manifest.get("kind") == backend.KIND:
            return manifest
    return {}


def kind_of(directory: Path) -> str | None:
    """Return which kind of export ``directory`` holds, None if it holds none."""
    return read_facts(directory).get("kind")


def load_call(directory: Path, threads: int | None = None, providers: tuple[str, ...] | None = None) -> Call:
    """Load the export in ``directory``; what is returned takes the program's arguments and gives its output tensors.

    Raises:
        GraphwrightError: The directory holds no complete export.
    """
    from ..backends import onnx_runner, torchscript

    runner: Any
    if kind_of(directory) == torchscript.KIND:
        runner = torchscript.TorchScriptRunner(directory)
    else:
        runner = onnx_runner.OnnxRunner(directory, providers, threads=threads)

    def call(*args: Any, **kwargs: Any) -> Any:
        # An export takes tensors alone: everything else is a constant of the capture.
        return runner(*(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

    return call


def size_of(manifest: Mapping[str, Any]) -> int:
    """Return the bytes of an export's files."""
    return sum(int(facts["bytes"]) for facts in manifest["files"].values())
