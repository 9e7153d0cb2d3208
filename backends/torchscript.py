"""TorchScript: the program traced and frozen at its example shapes, for runtimes that still take it.

TorchScript is deprecated as a whole, and a trace keeps the sizes it saw, even those of dimensions that the program
calls dynamic; so the artifact declares fixed shapes and its runner checks them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import ExportError, InputError
from ..graph.program import Program
from .artifacts import file_facts, read_manifest, staging, write_manifest
from .compare import default_tolerance, example_like, relative_difference, run_program
from .flat import FlatProgram, flat_program

KIND, FORMAT_VERSION = "torchscript", 1
MODEL_FILE, MANIFEST_FILE = "model.torchscript.pt", "torchscript.json"


@dataclass(frozen=True)
class TorchScriptArtifact:
    """A TorchScript file that was reloaded and compared with the program.

    Attributes:
        directory: Holds `path` and the manifest.
        manifest: What the manifest file says.
    """

    directory: Path
    manifest: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file for ``torch.jit.load``, in Python or LibTorch."""
        return self.directory / MODEL_FILE

    @property
    def max_difference(self) -> float:
        """The largest difference over all checks, relative to the output's magnitude."""
        return max(check["max_difference"] for check in self.manifest["checks"])

    def runner(self, device: str | torch.device = "cpu") -> TorchScriptRunner:
        """Load the file."""
        return TorchScriptRunner(self.directory, device)


def export_torchscript(
    program: Program, directory: str | os.PathLike[str], *, tolerance: float | None = None, seed: int = 0
) -> TorchScriptArtifact:
    """Write ``program`` as a traced, frozen TorchScript file with the shapes of its example inputs.

    The saved file is loaded again and compared with the program, on the example inputs and on other values of the
    same shapes, before it gets its name.

    Args:
        program: What to export. Inputs that are not tensors are left out, as they are constants.
        directory: Gets ``model.torchscript.pt`` and ``torchscript.json``; made if it is missing.
        tolerance: Largest difference to accept, relative to the largest magnitude of each output. The default follows
            from the program's dtypes: 1e-4 in float32.
        seed: Of the other values.

    Raises:
        ExportError: The program has no weights or draws random numbers, or the file does not compute what the
            program computes. Nothing is left behind.
    """
    flat = flat_program(program)
    limit = default_tolerance(program) if tolerance is None else tolerance
    with staging(directory, MANIFEST_FILE) as stage:
        _trace(flat, flat.select_inputs(program.example), stage / MODEL_FILE)
        with _no_jit_deprecation():
            loaded = torch.jit.load(stage / MODEL_FILE)
        checks = []
        for name, inputs in (
            ("example inputs", list(program.example)),
            (f"other values, seed {seed}", example_like(program, seed=seed)),
        ):
            expected = flat.select_outputs(run_program(program, inputs))
            with torch.no_grad():
                actual = loaded(*flat.select_inputs(inputs))
            differences = dict(zip(flat.outputs, relative_difference(expected, actual), strict=True))
            checks.append({"inputs": name, "differences": differences, "max_difference": max(differences.values())})
            _require_close(program, name, differences, limit)
        manifest = write_manifest(stage / MANIFEST_FILE, _manifest(program, flat, checks, limit, stage))
    return TorchScriptArtifact(Path(directory), manifest)


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
        self.manifest = read_manifest(directory, MANIFEST_FILE, KIND, FORMAT_VERSION)
        self.device = torch.device(device)
        self.input_names: tuple[str, ...] = tuple(entry["name"] for entry in self.manifest["inputs"])
        self.output_names: tuple[str, ...] = tuple(entry["name"] for entry in self.manifest["outputs"])
        with _no_jit_deprecation():
            self._module = torch.jit.load(Path(directory) / MODEL_FILE, map_location=self.device)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """Run on tensors, given in the order of `input_names` or by name; return those of `output_names`.

        Raises:
            InputError: An input is missing, unknown, or has another dtype or shape than was traced.
        """
        if len(args) > len(self.input_names):
            raise InputError(
                f"this TorchScript takes {len(self.input_names)} tensors {list(self.input_names)}, got {len(args)}"
            )
        given = dict(zip(self.input_names, args, strict=False))
        wrong = [name for name in kwargs if name not in self.input_names or name in given]
        missing = [name for name in self.input_names if name not in given and name not in kwargs]
        if wrong or missing:
            raise InputError(
                f"this TorchScript takes the inputs {list(self.input_names)}; missing: {missing}, "
                f"unknown or given twice: {wrong}"
            )
        given.update(kwargs)
        for entry in self.manifest["inputs"]:
            _check_input(entry, given[entry["name"]])
        with torch.no_grad():
            return tuple(self._module(*(given[name].to(self.device) for name in self.input_names)))


def _check_input(entry: Mapping[str, Any], value: object) -> None:
    name = entry["name"]
    if not isinstance(value, Tensor):
        raise InputError(f"input '{name}' must be a tensor, got {type(value).__name__}")
    if str(value.dtype) != f"torch.{entry['dtype']}":
        raise InputError(f"input '{name}' must have dtype torch.{entry['dtype']}, got {value.dtype}")
    if list(value.shape) != entry["shape"]:
        raise InputError(
            f"input '{name}' must have the shape {entry['shape']} it was traced with, got {list(value.shape)}; "
            "a TorchScript trace has fixed sizes: export again with example inputs of this shape, or export to ONNX"
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


def _require_close(program: Program, inputs: str, differences: Mapping[str, float], limit: float) -> None:
    name, worst = max(differences.items(), key=lambda item: item[1])
    if worst <= limit:
        return
    got = "another shape, dtype, integer or infinity" if math.isinf(worst) else f"a relative difference of {worst:.2g}"
    raise ExportError(
        f"the TorchScript of {program.name} does not compute what the program computes: output '{name}' on the "
        f"{inputs} has {got}, at most {limit:.2g} is accepted; nothing was written"
    )


def _manifest(
    program: Program, flat: FlatProgram, checks: list[dict[str, Any]], limit: float, stage: Path
) -> dict[str, Any]:
    examples = flat.select_inputs(program.example)
    expected = flat.select_outputs(run_program(program, program.example))
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "name": program.name,
        "inputs": [_entry(spec.name, value) for spec, value in zip(flat.inputs, examples, strict=True)],
        "outputs": [_entry(name, value) for name, value in zip(flat.outputs, expected, strict=True)],
        "constants": flat.constants,
        "dropped_outputs": flat.dropped,
        "torch": str(torch.__version__),
        "checks": checks,
        "tolerance": limit,
        "notes": list(program.notes),
        "files": file_facts(stage),
    }


def _entry(name: str, value: Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
