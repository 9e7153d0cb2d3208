"""ONNX: a program as a file, or a plan as a file for each stage, that ONNX Runtime has loaded and compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graph.errors import ArtifactError, ExportError
from ..graph.plan import Plan, Staged
from ..graph.program import Program
from .artifacts import file_facts, read_manifest, staging, write_manifest
from .flat import require_exportable_stages
from .onnx_file import FLOAT16_TOLERANCE, Call, OnnxFile, OnnxOptions
from .onnx_runner import FORMAT_VERSION, KIND, MANIFEST_FILE, MODEL_FILE, PLAN_KIND, OnnxRunner
from .onnx_weights import share_weights
from .runner_program import RunnerProgram, plan_facts, staged


@dataclass(frozen=True)
class OnnxArtifact:
    """ONNX files that were loaded in ONNX Runtime and compared with the program, or with the stages of the plan.

    Attributes:
        directory: Holds the files, their external data and the manifest.
        manifest: What ``manifest.json`` says.
    """

    directory: Path
    manifest: Mapping[str, Any]

    @property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """What the manifest says of each file, by the file's name without its suffix."""
        return self.manifest.get("stages") or {Path(MODEL_FILE).stem: self.manifest}

    @property
    def path(self) -> Path:
        """The ``.onnx`` file of a program. Open it by its path: the weights lie beside it.

        Raises:
            ArtifactError: It is a plan, which has several.
        """
        if "stages" in self.manifest:
            raise ArtifactError(f"{self.directory} holds a plan with the files {', '.join(self.stages)}: take plan()")
        return self.directory / MODEL_FILE

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set; the highest one of a plan's files."""
        return max(facts["opset"] for facts in self.stages.values())

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that the comparison ran on."""
        return tuple(next(iter(self.stages.values()))["providers"])

    @property
    def max_difference(self) -> float:
        """The largest difference over all checks of all files, relative to the output's magnitude."""
        return max(check["max_difference"] for facts in self.stages.values() for check in facts["checks"])

    def runner(self, providers: Sequence[str] | None = None, **options: Any) -> OnnxRunner:
        """Open the file of a program; see `OnnxRunner`."""
        return OnnxRunner(self.directory, providers, **options)

    def plan(self, providers: Sequence[str] | None = None, **options: Any) -> Staged[RunnerProgram]:
        """Open the files of a plan; see `load_onnx_plan`."""
        return load_onnx_plan(self.directory, providers, **options)


def export_onnx(
    output: Program | Plan,
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
    """Write a program as ``model.onnx`` with its external data ``model.onnx.data`` and ``manifest.json``.

    A plan becomes ``STAGE.onnx`` for every stage. They share ``weights.data``, which holds each tensor once, and the
    manifest says how the stages hand tensors on, and by which schedule.

    Every saved file is checked by ``onnx.checker``, loaded in ONNX Runtime and compared with its program: on the
    example inputs, on other values, and at a second shape in which every dynamic dimension differs. Only then it gets
    its name. What is exported and its tensors are not changed.

    Args:
        output: What to export. Inputs that are not tensors are left out, as they are constants of the capture.
        directory: Made if it is missing. An earlier export in it is replaced.
        opset: ONNX operator set, 18 or more. None chooses, see `choose_opset`.
        fp16: Convert the verified float32 files to float16; inputs and outputs keep their types, and so do registers.
        providers: Execution providers to compare on (``"cuda"``, ``"cpu"``, or full names). None takes the best that
            work: TensorRT, CUDA, CPU.
        allow_fallback: Accept that a requested provider does not work.
        tolerance: Largest difference to accept, relative to the largest magnitude of each output. The default follows
            from the program's dtypes: 1e-4 in float32.
        fp16_tolerance: The same for a float16 file.
        second_shape: Sizes by name of a dynamic dimension for the second shape. True chooses: one more for a batch,
            twice the size for the others. False compares at the example's shape only, and the manifest says so.
        check_inputs: More calls to compare, as ``(args, kwargs)`` of the captured module; for a program alone.
        seed: Of the other values.

    Raises:
        ExportError: A program cannot be exported, or a file differs from it by more than accepted. Nothing is left
            behind.
        ProviderError: ONNX Runtime or a requested provider does not work.
        InputError: One of ``check_inputs`` does not fit the program.
    """
    options = OnnxOptions(
        opset, fp16, providers, allow_fallback, tolerance, fp16_tolerance, second_shape, check_inputs, seed
    )
    if isinstance(output, Plan):
        return _export_plan(output, Path(directory), options)
    made = OnnxFile(output, options)
    with staging(directory, MANIFEST_FILE) as folder:
        _write(made, folder, fp16)
        made.verify(folder / MODEL_FILE)
        facts = {"kind": KIND, "format_version": FORMAT_VERSION, **made.facts, "files": file_facts(folder)}
        manifest = write_manifest(folder / MANIFEST_FILE, facts)
    return OnnxArtifact(Path(directory), manifest)


def load_onnx_plan(
    directory: str | os.PathLike[str], providers: Sequence[str] | None = None, **options: Any
) -> Staged[RunnerProgram]:
    """Open a plan that `export_onnx` wrote: ``.module()`` is called like the denoiser.

    Registers stay on the device that the sessions run on.

    Args:
        directory: Of the export.
        providers: Execution providers in order of preference; None takes the best that work.
        options: Further options of `OnnxRunner`.

    Raises:
        ArtifactError: The directory holds no complete exported plan, or ONNX Runtime does not load a file.
        ProviderError: ONNX Runtime or a requested provider does not work.
    """
    folder = Path(directory)
    manifest = read_manifest(folder, MANIFEST_FILE, PLAN_KIND, FORMAT_VERSION)

    def opened(name: str, facts: Mapping[str, Any]) -> OnnxRunner:
        return OnnxRunner.of_file(folder / f"{name}.onnx", facts, providers, **options)

    return staged(manifest, opened)


def _export_plan(plan: Plan, directory: Path, options: OnnxOptions) -> OnnxArtifact:
    if options.check_inputs:
        raise ExportError("check_inputs are calls of one program, and a plan has several; leave them out")
    require_exportable_stages(plan)
    with staging(directory, MANIFEST_FILE) as folder:
        parts = folder / "parts"
        made: dict[str, OnnxFile] = {}
        for name, stage in plan.stages.items():
            (parts / name).mkdir(parents=True)
            try:
                made[name] = OnnxFile(stage.program, options)
                _write(made[name], parts / name, options.fp16)
            except ExportError as err:
                raise ExportError(f"stage '{name}': {err}") from err
        weights = share_weights({name: parts / name / MODEL_FILE for name in made}, folder)
        shutil.rmtree(parts)
        for name, part in made.items():
            part.verify(folder / f"{name}.onnx")
        facts = plan_facts(plan, {name: part.facts for name, part in made.items()})
        facts = {"kind": PLAN_KIND, "format_version": FORMAT_VERSION, **facts, "weight_bytes": weights}
        manifest = write_manifest(folder / MANIFEST_FILE, {**facts, "files": file_facts(folder)})
    return OnnxArtifact(directory, manifest)


def _write(made: OnnxFile, folder: Path, fp16: bool) -> None:
    """Write ``model.onnx`` into ``folder``, converted from a float32 file that was verified if it is to be float16."""
    if not fp16:
        made.save(folder / MODEL_FILE)
        return
    full = folder / "float32"
    full.mkdir()
    made.save(full / MODEL_FILE)
    made.verify(full / MODEL_FILE)
    made.to_half(full / MODEL_FILE, folder / MODEL_FILE)
    shutil.rmtree(full)
