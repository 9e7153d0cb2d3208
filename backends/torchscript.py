"""TorchScript: the program traced and frozen at its example shapes, for runtimes that still take it.

TorchScript is deprecated as a whole, and a trace keeps the sizes it saw, even those of dimensions that the program
calls dynamic; so the artifact declares fixed shapes and its runner checks them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from ..graph.compare import example_like
from ..graph.errors import ArtifactError, ExportError, InputError, where
from ..graph.plan import Plan, Staged
from ..graph.program import Program
from .artifacts import (
    bind_inputs,
    check_tensor,
    file_facts,
    read_manifest,
    staging,
    tensor_entry,
    write_manifest,
)
from .compare import Check, compare, default_tolerance, run_program
from .flat import FlatProgram, flat_program, require_exportable_stages
from .runner_program import RunnerProgram, call_facts, plan_facts, staged

KIND, PLAN_KIND, FORMAT_VERSION = "torchscript", "torchscript-plan", 1
MODEL_FILE, MANIFEST_FILE = "model.torchscript.pt", "torchscript.json"


@dataclass(frozen=True)
class TorchScriptArtifact:
    """TorchScript files that were reloaded and compared with the program, or with the stages of the plan.

    Attributes:
        directory: Holds the files and the manifest.
        manifest: What the manifest file says.
    """

    directory: Path
    manifest: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file of a program for ``torch.jit.load``, in Python or LibTorch.

        Raises:
            ArtifactError: It is a plan, which has several.
        """
        if "stages" in self.manifest:
            raise ArtifactError(f"{self.directory} holds a plan, one file for each stage: take plan()")
        return self.directory / MODEL_FILE

    @property
    def max_difference(self) -> float:
        """The largest difference over all checks, relative to the output's magnitude."""
        stages = self.manifest.get("stages") or {"": self.manifest}
        return max(check["max_difference"] for facts in stages.values() for check in facts["checks"])

    def runner(self, device: str | torch.device = "cpu") -> TorchScriptRunner:
        """Load the file of a program."""
        return TorchScriptRunner(self.directory, device)

    def plan(self, device: str | torch.device = "cpu") -> Staged[RunnerProgram]:
        """Load the files of a plan; see `load_torchscript_plan`."""
        return load_torchscript_plan(self.directory, device)


def export_torchscript(
    output: Program | Plan, directory: str | os.PathLike[str], *, tolerance: float | None = None, seed: int = 0
) -> TorchScriptArtifact:
    """Write a program as a traced, frozen TorchScript file with the shapes of its example inputs.

    A plan becomes ``STAGE.torchscript.pt`` for every stage, each with its own weights: the format cannot share them.

    Every saved file is loaded again and compared with its program, on the example inputs and on other values of the
    same shapes, before it gets its name.

    Args:
        output: What to export. Inputs that are not tensors are left out, as they are constants.
        directory: Gets ``model.torchscript.pt`` and ``torchscript.json``; made if it is missing.
        tolerance: Largest difference to accept, relative to the largest magnitude of each output. The default follows
            from the program's dtypes: 1e-4 in float32.
        seed: Of the other values.

    Raises:
        ExportError: The program has no weights, draws random numbers or has parts that it runs only under a condition,
            or the file does not compute what the program computes. Nothing is left behind.
    """
    stages = {name: stage.program for name, stage in output.stages.items()} if isinstance(output, Plan) else {}
    if isinstance(output, Plan):
        require_exportable_stages(output)
    head = {"kind": PLAN_KIND if stages else KIND, "format_version": FORMAT_VERSION}
    with staging(directory, MANIFEST_FILE) as folder:
        if isinstance(output, Plan):
            made = {name: _export(stages[name], _stage_file(folder, name), tolerance, seed) for name in stages}
            facts = plan_facts(output, made)
        else:
            facts = _export(output, folder / MODEL_FILE, tolerance, seed)
        manifest = write_manifest(folder / MANIFEST_FILE, {**head, **facts, "files": file_facts(folder)})
    return TorchScriptArtifact(Path(directory), manifest)


def load_torchscript_plan(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> Staged[RunnerProgram]:
    """Load a plan that `export_torchscript` wrote: ``.module()`` is called like the denoiser.

    Raises:
        ArtifactError: The directory holds no complete exported plan of this format version.
    """
    folder = Path(directory)
    manifest = read_manifest(folder, MANIFEST_FILE, PLAN_KIND, FORMAT_VERSION)
    return staged(manifest, lambda name, facts: TorchScriptRunner.of_file(_stage_file(folder, name), facts, device))


def _stage_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.torchscript.pt"


def _export(program: Program, file: Path, tolerance: float | None, seed: int) -> dict[str, Any]:
    """Write one file and compare it; return what the manifest says of it."""
    flat = flat_program(program)
    _require_operators(program)
    limit = default_tolerance(program) if tolerance is None else tolerance
    checks = [
        Check(name, flat.select_inputs(inputs), flat.select_outputs(run_program(program, inputs)))
        for name, inputs in (
            ("example inputs", list(program.example)),
            (f"other values, seed {seed}", example_like(program, seed=seed)),
        )
    ]
    _trace(flat, flat.select_inputs(program.example), file)
    with _no_jit_deprecation():
        loaded = torch.jit.load(file)
    report = []
    for check in checks:
        with torch.no_grad():
            actual = loaded(*check.inputs)
        report.append(compare(f"the TorchScript of {program.name}", flat.outputs, check, actual, limit))
    return _describe(program, flat, checks[0], report, limit)


class TorchScriptRunner:
    """Calls a TorchScript export.

    Unlike the other artifacts of this library, a TorchScript file holds a program of its own that loading and
    calling executes: load only files that you trust.
    """

    def __init__(self, directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> None:
        """Load the export in ``directory`` onto ``device``.

        Raises:
            ArtifactError: The directory holds no complete export of this format version.
        """
        self._open(Path(directory) / MODEL_FILE, read_manifest(directory, MANIFEST_FILE, KIND, FORMAT_VERSION), device)

    @classmethod
    def of_file(cls, file: Path, facts: Mapping[str, Any], device: str | torch.device = "cpu") -> TorchScriptRunner:
        """Load one file whose inputs and outputs ``facts`` describes, as a manifest does; see `__init__`."""
        runner = cls.__new__(cls)
        runner._open(file, facts, device)
        return runner

    def _open(self, file: Path, facts: Mapping[str, Any], device: str | torch.device) -> None:
        self.manifest = facts
        self.device = torch.device(device)
        self.input_names: tuple[str, ...] = tuple(entry["name"] for entry in self.manifest["inputs"])
        self.output_names: tuple[str, ...] = tuple(entry["name"] for entry in self.manifest["outputs"])
        with _no_jit_deprecation():
            self._module = torch.jit.load(file, map_location=self.device)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """Run on tensors, given in the order of `input_names` or by name; return those of `output_names`.

        Raises:
            InputError: An input is missing, unknown, or has another dtype or shape than was traced.
        """
        given = bind_inputs("TorchScript", self.input_names, args, kwargs)
        return self.run(list(given.values()))

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on tensors in the order of `input_names`; see `__call__`."""
        for entry, tensor in zip(self.manifest["inputs"], tensors, strict=True):
            _check_input(entry, tensor)
        with torch.no_grad():
            return tuple(self._module(*(tensor.to(self.device) for tensor in tensors)))


def _check_input(entry: Mapping[str, Any], value: object) -> None:
    value = check_tensor(entry, value)
    if list(value.shape) != entry["shape"]:
        raise InputError(
            f"input '{entry['name']}' must have the shape {entry['shape']} it was traced with, got {list(value.shape)}; "
            "a TorchScript trace has fixed sizes: export again with example inputs of this shape, or export to ONNX"
        )


def _require_operators(program: Program) -> None:
    """Refuse operators that take a graph: a condition or a loop, of which a trace would keep one course."""
    for node in program.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise ExportError(
                f"TorchScript is a trace and cannot hold '{node.target.name()}' of {program.name}; export it to ONNX, or "
                f"capture it with the course that is wanted written out\n  at {where(node)}"
            )


def _trace(flat: FlatProgram, inputs: Sequence[Tensor], file: Path) -> None:
    with _no_jit_deprecation(), torch.no_grad():
        traced = torch.jit.trace(flat.module.eval(), tuple(inputs), check_trace=False)
        torch.jit.freeze(traced).save(str(file))


@contextmanager
def _no_jit_deprecation() -> Iterator[None]:
    # That TorchScript is deprecated is known to whoever asks for it; every other warning stays.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.", DeprecationWarning)
        yield


def _describe(
    program: Program, flat: FlatProgram, example: Check, report: list[dict[str, Any]], limit: float
) -> dict[str, Any]:
    return {
        "name": program.name,
        "inputs": [tensor_entry(s.name, v.dtype, v.shape) for s, v in zip(flat.inputs, example.inputs, strict=True)],
        "outputs": [tensor_entry(n, v.dtype, v.shape) for n, v in zip(flat.outputs, example.expected, strict=True)],
        "constants": flat.constants,
        "dropped_outputs": flat.dropped,
        "torch": str(torch.__version__),
        "checks": report,
        "tolerance": limit,
        "notes": list(program.notes),
        **call_facts(program, flat),
    }
