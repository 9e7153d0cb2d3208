"""ONNX: the program as a file that ONNX Runtime has loaded and that computes what the program computes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..graph.compare import dynamic_sizes, example_like
from ..graph.errors import ArtifactError, ExportError
from ..graph.program import Program
from .artifacts import file_facts, staging, summary, tensor_entry, write_manifest
from .compare import Check, compare, default_tolerance, describe_sizes, inputs_at_other_sizes, run_program
from .flat import FlatProgram, flat_program
from .onnx_cleanup import clean_up
from .onnx_convert import OLDEST_OPSET, Converted, choose_opset, convert
from .onnx_half import convert_to_float16
from .onnx_runner import FORMAT_VERSION, KIND, MANIFEST_FILE, MODEL_FILE, OnnxRunner
from .onnx_runtime import CUDA, INSTALL, choose_providers, import_onnxruntime

FLOAT16_TOLERANCE = 2e-2
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class OnnxArtifact:
    """An ONNX file that was loaded in ONNX Runtime and compared with the program.

    Attributes:
        directory: Holds `path`, its external data and the manifest.
        manifest: What ``manifest.json`` says.
    """

    directory: Path
    manifest: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The ``.onnx`` file. Open it by its path: the weights lie beside it."""
        return self.directory / MODEL_FILE

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set."""
        return self.manifest["opset"]

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that the comparison ran on."""
        return tuple(self.manifest["providers"])

    @property
    def max_difference(self) -> float:
        """The largest difference over all checks of the file, relative to the output's magnitude."""
        return max(check["max_difference"] for check in self.manifest["checks"])

    def runner(self, providers: Sequence[str] | None = None, **options: Any) -> OnnxRunner:
        """Open the file; see `OnnxRunner`."""
        return OnnxRunner(self.directory, providers, **options)


def export_onnx(
    program: Program,
    directory: str | os.PathLike[str],
    *,
    opset: int | None = None,
    fp16: bool = False,
    providers: Sequence[str] | None = None,
    allow_fallback: bool = False,
    tolerance: float | None = None,
    fp16_tolerance: float = FLOAT16_TOLERANCE,
    second_shape: bool | Mapping[str, int] = True,
    check_inputs: Sequence[Call] = (),
    seed: int = 0,
) -> OnnxArtifact:
    """Write ``program`` as ``model.onnx`` with its external data ``model.onnx.data`` and ``manifest.json``.

    The saved file is checked by ``onnx.checker``, loaded in ONNX Runtime and compared with the program: on the
    example inputs, on other values, and at a second shape in which every dynamic dimension differs. Only then it gets
    its name. The program and its tensors are not changed.

    Args:
        program: What to export. Inputs that are not tensors are left out, as they are constants of the capture.
        directory: Made if it is missing. An earlier export in it is replaced.
        opset: ONNX operator set, 18 or more. None chooses, see `choose_opset`.
        fp16: Convert the verified float32 file to float16; inputs and outputs keep their types.
        providers: Execution providers to compare on (``"cuda"``, ``"cpu"``, or full names). None takes the best that
            work: TensorRT, CUDA, CPU.
        allow_fallback: Accept that a requested provider does not work.
        tolerance: Largest difference to accept, relative to the largest magnitude of each output. The default follows
            from the program's dtypes: 1e-4 in float32.
        fp16_tolerance: The same for the float16 file.
        second_shape: Sizes by name of a dynamic dimension for the second shape. True chooses: one more for a batch,
            twice the size for the others. False compares at the example's shape only, and the manifest says so.
        check_inputs: More calls to compare, as ``(args, kwargs)`` of the captured module.
        seed: Of the other values.

    Raises:
        ExportError: The program cannot be exported, or a file differs from it by more than accepted. Nothing is left
            behind.
        ProviderError: ONNX Runtime or a requested provider does not work.
        InputError: One of ``check_inputs`` does not fit the program.
    """
    ort = _require_packages()
    choose_providers(providers, ort.get_available_providers())
    flat = flat_program(program)
    replaced = clean_up(flat.module)
    chosen, reason = choose_opset(program.graph_module)
    if opset is not None:
        chosen, reason = _checked_opset(opset), "as asked for"
    limit = default_tolerance(program) if tolerance is None else tolerance
    checks = _plan_checks(program, flat, second_shape, check_inputs, seed)
    converted = convert(flat, flat.select_inputs(program.example), chosen)
    facts = _describe(program, flat, converted, checks)
    facts |= {"opset": chosen, "opset_reason": reason, "substituted_operators": replaced, "precision": "float32"}
    facts["onnxruntime"] = ort.__version__
    if second_shape is False and dynamic_sizes(program):
        facts["notes"].append("the dynamic dimensions were not checked: second_shape=False")
    with staging(directory, MANIFEST_FILE) as stage:
        converted.program.save(stage / MODEL_FILE, external_data=True)
        facts |= _verify(program, stage, facts, checks, limit, providers, allow_fallback)
        if fp16:
            facts |= {"precision": "float16", "float32_checks": facts["checks"], "float32_tolerance": limit}
            _to_half(stage)
            facts |= _verify(program, stage, facts, checks, fp16_tolerance, providers, allow_fallback)
        manifest = write_manifest(stage / MANIFEST_FILE, facts)
    return OnnxArtifact(Path(directory), manifest)


def _require_packages() -> Any:
    missing = [name for name in ("onnx", "onnxscript", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"the ONNX export needs {', '.join(missing)}; {INSTALL}")
    return import_onnxruntime()


def _checked_opset(opset: int) -> int:
    if opset < OLDEST_OPSET:
        raise ValueError(f"opset must be at least {OLDEST_OPSET}, got {opset}")
    return opset


def _plan_checks(
    program: Program,
    flat: FlatProgram,
    second_shape: bool | Mapping[str, int],
    calls: Sequence[Call],
    seed: int,
) -> list[Check]:
    """Return what to compare, with the program's own outputs."""
    plain = {"example inputs": list(program.example), f"other values, seed {seed}": example_like(program, seed=seed)}
    plain |= {f"check_inputs[{i}]": program.flatten(*args, **kwargs) for i, (args, kwargs) in enumerate(calls)}
    checks = [
        Check(name, flat.select_inputs(inputs), flat.select_outputs(run_program(program, inputs)))
        for name, inputs in plain.items()
    ]
    if second_shape is False or not dynamic_sizes(program):
        return checks
    sizes = None if second_shape is True else second_shape
    inputs, outputs = inputs_at_other_sizes(program, sizes, seed + 1)
    found = dynamic_sizes(program, inputs)
    name = f"second shape {describe_sizes(found)}, seed {seed + 1}"
    return [*checks, Check(name, flat.select_inputs(inputs), flat.select_outputs(outputs))]


def _describe(program: Program, flat: FlatProgram, converted: Converted, checks: Sequence[Check]) -> dict[str, Any]:
    notes = list(program.notes)
    silent = [
        name for name, value in zip(flat.outputs, checks[0].expected, strict=True) if not bool((value != 0).any())
    ]
    if silent:
        notes.append(f"zero on the example inputs, so that comparing shows little: {', '.join(silent)}")
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "name": program.name,
        "inputs": [tensor_entry(spec.name, spec.dtype, spec.shape) for spec in flat.inputs],
        "outputs": [
            tensor_entry(name, value.dtype, shape)
            for name, value, shape in zip(flat.outputs, checks[0].expected, converted.outputs, strict=True)
        ],
        "constants": flat.constants,
        "dropped_outputs": flat.dropped,
        "guards": list(converted.guards),
        "notes": notes,
        "torch": str(torch.__version__),
    }


def _verify(
    program: Program,
    stage: Path,
    facts: Mapping[str, Any],
    checks: Sequence[Check],
    limit: float,
    providers: Sequence[str] | None,
    allow_fallback: bool,
) -> dict[str, Any]:
    """Check the saved file and compare it with the program; return what the manifest says about that."""
    import onnx

    try:
        onnx.checker.check_model(stage / MODEL_FILE)
    except onnx.checker.ValidationError as err:
        raise ExportError(f"the ONNX file of {program.name} is not valid: {summary(err)}") from err
    (stage / MANIFEST_FILE).unlink(missing_ok=True)
    files = {"files": file_facts(stage)}
    write_manifest(stage / MANIFEST_FILE, {**facts, **files})
    runner = _open(program, stage, providers, allow_fallback)
    report = []
    for check in checks:
        try:
            actual = runner(*(tensor.cpu() for tensor in check.inputs))
        # ONNX Runtime's errors have no base class of their own; any of them means that the file does not run.
        except Exception as err:
            raise ExportError(
                f"the ONNX file of {program.name} does not run on the {check.name}, where the program does: "
                f"{summary(err)}"
            ) from err
        what = f"the {facts['precision']} ONNX file of {program.name}"
        report.append(compare(what, runner.output_names, check, actual, limit))
    lost = [name for name in _wanted(providers) if name not in runner.providers]
    notes = [f"{name} is built into ONNX Runtime but not active here" for name in lost]
    notes = [*facts["notes"], *(note for note in notes if note not in facts["notes"])]
    return {**files, "providers": list(runner.providers), "checks": report, "tolerance": limit, "notes": notes}


def _wanted(providers: Sequence[str] | None) -> list[str]:
    return choose_providers(providers, import_onnxruntime().get_available_providers())


def _open(program: Program, stage: Path, providers: Sequence[str] | None, allow_fallback: bool) -> OnnxRunner:
    # TF32 differs from float32 by more than the tolerance.
    options = {CUDA: {"use_tf32": 0}} if CUDA in _wanted(providers) else None
    try:
        return OnnxRunner(stage, providers, allow_fallback=allow_fallback, provider_options=options)
    except ArtifactError as err:
        half = any(spec.dtype is torch.bfloat16 for spec in program.inputs) or any(
            tensor.dtype is torch.bfloat16 for tensor in program.tensors().values()
        )
        advice = (
            "; the CPU provider has few bfloat16 kernels: convert the model to float32 before capture" if half else ""
        )
        raise ExportError(f"the ONNX file of {program.name} does not load: {summary(err)}{advice}") from err


def _to_half(stage: Path) -> None:
    """Replace the float32 file in ``stage`` by its float16 form."""
    full = stage / "float32"
    full.mkdir()
    for file in [file for file in stage.iterdir() if file.is_file()]:
        shutil.move(file, full / file.name)
    convert_to_float16(full / MODEL_FILE, stage / MODEL_FILE)
    shutil.rmtree(full)
