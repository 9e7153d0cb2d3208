"""One ONNX file of one program: conversion, checks, float16, and the comparison in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..graph.compare import dynamic_sizes, example_like
from ..graph.errors import ArtifactError, ExportError
from ..graph.program import Program
from .artifacts import summary, tensor_entry
from .compare import Check, compare, default_tolerance, describe_sizes, inputs_at_other_sizes, run_program
from .flat import FlatProgram, flat_program
from .onnx_cleanup import clean_up
from .onnx_convert import OLDEST_OPSET, Converted, choose_opset, convert
from .onnx_half import convert_to_float16
from .onnx_runner import OnnxRunner
from .onnx_runtime import CUDA, INSTALL, choose_providers, import_onnxruntime
from .runner_program import call_facts

FLOAT16_TOLERANCE = 2e-2
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class OnnxOptions:
    """The options of `export_onnx`, which says what they mean."""

    opset: int | None = None
    fp16: bool = False
    providers: Sequence[str] | None = None
    allow_fallback: bool = False
    tolerance: float | None = None
    fp16_tolerance: float = FLOAT16_TOLERANCE
    second_shape: bool | Mapping[str, int] = True
    check_inputs: Sequence[Call] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset < OLDEST_OPSET:
            raise ValueError(f"opset must be at least {OLDEST_OPSET}, got {self.opset}")


class OnnxFile:
    """A program that was converted, and what its file must compute.

    Attributes:
        program: What was converted.
        facts: What a manifest says of the file; grows with every step.
    """

    def __init__(self, program: Program, options: OnnxOptions) -> None:
        """Convert ``program``.

        Raises:
            ExportError: It cannot be exported.
            ProviderError: ONNX Runtime or a requested provider does not work.
            InputError: One of ``check_inputs`` does not fit the program.
        """
        ort = _require_packages()
        choose_providers(options.providers, ort.get_available_providers())
        self.program, self._options = program, options
        flat = flat_program(program)
        replaced = clean_up(flat.module)
        chosen, reason = choose_opset(program.graph_module)
        if options.opset is not None:
            chosen, reason = options.opset, "as asked for"
        self.limit = default_tolerance(program) if options.tolerance is None else options.tolerance
        self._checks = _plan_checks(program, flat, options)
        self._converted = convert(flat, flat.select_inputs(program.example), chosen)
        self.facts = _describe(program, flat, self._converted, self._checks)
        self.facts |= {"opset": chosen, "opset_reason": reason, "substituted_operators": replaced}
        self.facts |= {"precision": "float32", "onnxruntime": ort.__version__, **call_facts(program, flat)}
        if options.second_shape is False and dynamic_sizes(program):
            self.facts["notes"].append("the dynamic dimensions were not checked: second_shape=False")

    def save(self, file: Path) -> None:
        """Write the file, with external data ``<name>.data`` beside it."""
        self._converted.program.save(file, external_data=True)

    def to_half(self, source: Path, target: Path) -> None:
        """Write the verified float32 file ``source`` as float16; ``target`` lies in another folder."""
        convert_to_float16(source, target)
        half = {"precision": "float16", "float32_checks": self.facts["checks"], "float32_tolerance": self.limit}
        self.facts |= half
        self.limit = self._options.fp16_tolerance

    def verify(self, file: Path) -> None:
        """Check the saved file and compare it with the program.

        Raises:
            ExportError: It is not valid, does not load, or computes something else.
        """
        import onnx

        program = self.program
        try:
            onnx.checker.check_model(file)
        except onnx.checker.ValidationError as err:
            raise ExportError(f"the ONNX file of {program.name} is not valid: {summary(err)}") from err
        runner = self._open(file)
        what = f"the {self.facts['precision']} ONNX file of {program.name}"
        report = [
            compare(what, runner.output_names, check, _run(runner, program, check), self.limit)
            for check in self._checks
        ]
        lost = [name for name in self._wanted() if name not in runner.providers]
        notes = [f"{name} is built into ONNX Runtime but not active here" for name in lost]
        notes = [*self.facts["notes"], *(note for note in notes if note not in self.facts["notes"])]
        self.facts |= {"providers": list(runner.providers), "checks": report, "tolerance": self.limit, "notes": notes}

    def _wanted(self) -> list[str]:
        return choose_providers(self._options.providers, import_onnxruntime().get_available_providers())

    def _open(self, file: Path) -> OnnxRunner:
        program, options = self.program, self._options
        # TF32 differs from float32 by more than the tolerance.
        settings = {CUDA: {"use_tf32": 0}} if CUDA in self._wanted() else None
        try:
            return OnnxRunner.of_file(
                file,
                self.facts,
                options.providers,
                allow_fallback=options.allow_fallback,
                provider_options=settings,
            )
        except ArtifactError as err:
            half = any(spec.dtype is torch.bfloat16 for spec in program.inputs) or any(
                tensor.dtype is torch.bfloat16 for tensor in program.tensors().values()
            )
            advice = (
                "; the CPU provider has few bfloat16 kernels: convert the model to float32 before capture"
                if half
                else ""
            )
            raise ExportError(f"the ONNX file of {program.name} does not load: {summary(err)}{advice}") from err


def _run(runner: OnnxRunner, program: Program, check: Check) -> tuple[torch.Tensor, ...]:
    try:
        return runner(*(tensor.cpu() for tensor in check.inputs))
    # ONNX Runtime's errors have no base class of their own; any of them means that the file does not run.
    except Exception as err:
        raise ExportError(
            f"the ONNX file of {program.name} does not run on the {check.name}, where the program does: {summary(err)}"
        ) from err


def _require_packages() -> Any:
    missing = [name for name in ("onnx", "onnxscript", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"the ONNX export needs {', '.join(missing)}; {INSTALL}")
    return import_onnxruntime()


def _plan_checks(program: Program, flat: FlatProgram, options: OnnxOptions) -> list[Check]:
    """Return what to compare, with the program's own outputs."""
    second_shape, seed, calls = options.second_shape, options.seed, options.check_inputs
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
