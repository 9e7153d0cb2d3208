"""Saved programs and plans: a directory of a JSON document, ``model.safetensors`` and ``example.safetensors``.

Loading runs no code from the files: the graph is rebuilt from names of registered operators, weights are
safetensors, and what would need an import from a package that is not trusted is refused with a sentence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .document import decode_program, encode_program
from .document_files import PLAN_FORM, PROGRAM_FORM, read, read_tensors, write
from .encoding import decode
from .errors import ArtifactError, PreconditionError, VerificationError
from .plan import Plan, Stage
from .program import Program, tensor_identity
from .schedules import REFRESH
from .schedules import decode as decode_schedule
from .symbols import SymbolTable
from .tensor_records import restore, restore_tensors
from .values import at_example_sizes
from .verify import verify

WEIGHTS_FILE, EXAMPLE_FILE = "model.safetensors", "example.safetensors"
# What a damaged document makes of the code that reads it.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError)


def save_program(program: Program, directory: str | os.PathLike[str]) -> None:
    """Write ``program`` to ``directory``, which is made if needed; a program saved there before is replaced.

    Weights are stored once per tensor (tied names refer to the first), those on the ``meta`` device by shape
    alone. Of where a node comes from, the module path and the innermost line of the user's code are kept.

    Raises:
        ArtifactError: ``directory`` is a file, or the program cannot be saved: it calls something that is no registered
            operator, a tensor has a dtype that safetensors lacks, or a class of its outputs could not be found again.
        OSError: The directory cannot be written. Nothing half-written is left.
    """
    document, data = encode_program(program)
    write(directory, document, {WEIGHTS_FILE: data, EXAMPLE_FILE: _example(program)})


def load_program(directory: str | os.PathLike[str]) -> Program:
    """Load what `save_program` wrote, and verify it.

    Every operator is replayed on fake tensors at the example sizes and compared with what was recorded, so that a
    program whose operators mean something else in the installed torch is refused rather than run.

    Raises:
        ArtifactError: The directory holds no saved program, a file is damaged or of another save, it was
            written by a newer version, or it needs an operator, a class or a device that is not here.
    """
    folder = Path(directory)
    document, stamp = read(folder)
    weights = read_tensors(folder / WEIGHTS_FILE, stamp)
    stored = read_tensors(folder / EXAMPLE_FILE, stamp)
    with _reading(folder, folder / PROGRAM_FORM.file, document):
        return _rebuilt(document, restore_tensors(document["tensors"], weights), stored)


def save_plan(plan: Plan, directory: str | os.PathLike[str]) -> None:
    """Write ``plan`` to ``directory``: ``plan.json``, ``model.safetensors`` and ``example.safetensors``.

    A tensor that several stages read is stored once. Everything else is as in `save_program`.

    Raises:
        ArtifactError: ``directory`` is a file, or a stage cannot be saved; names it.
        OSError: The directory cannot be written. Nothing half-written is left.
    """
    weights, examples = _Store(), _Store()
    stages: dict[str, Any] = {}
    for name, stage in plan.stages.items():
        try:
            document, data = encode_program(stage.program)
        except ArtifactError as err:
            raise ArtifactError(f"stage '{name}': {err}") from err
        stages[name] = {
            "reads": list(stage.reads),
            "writes": list(stage.writes),
            "tensors": {own: weights.put(name, own, tensor) for own, tensor in data.items()},
            "example": {own: examples.put(name, own, leaf) for own, leaf in _example(stage.program).items()},
            "program": document,
        }
    document = {
        "name": plan.name,
        "timestep": plan.timestep,
        "notes": list(plan.notes),
        "schedule": plan.schedule.encode(),
        "extrapolation": plan.extrapolation,
        "inputs": len(plan.inputs),
        "stages": stages,
    }
    write(directory, document, {WEIGHTS_FILE: weights.tensors, EXAMPLE_FILE: examples.tensors}, PLAN_FORM)


def load_plan(directory: str | os.PathLike[str]) -> Plan:
    """Load what `save_plan` wrote, and verify every stage as `load_program` does; stages share tensors again.

    Raises:
        ArtifactError: As for `load_program`, or the stages and the schedule do not fit together.
    """
    folder = Path(directory)
    document, stamp = read(folder, PLAN_FORM)
    weights = read_tensors(folder / WEIGHTS_FILE, stamp)
    stored = read_tensors(folder / EXAMPLE_FILE, stamp)
    shared: dict[str, Tensor] = {}
    stages: dict[str, Stage] = {}
    with _reading(folder, folder / PLAN_FORM.file, document):
        for name, entry in document["stages"].items():
            program = entry["program"]
            data = {own: weights[at] for own, at in entry["tensors"].items()}
            tensors = restore_tensors(program["tensors"], data)
            for own in tensors:
                record = program["tensors"][own]
                place = json.dumps([entry["tensors"].get(record.get("alias", own)), own, record], sort_keys=True)
                tensors[own] = shared.setdefault(place, tensors[own])
            rebuilt = _rebuilt(program, tensors, {own: stored[at] for own, at in entry["example"].items()})
            stages[name] = Stage(rebuilt, tuple(map(str, entry["reads"])), tuple(map(str, entry["writes"])))
        plan = Plan(
            stages,
            decode_schedule(document["schedule"]),
            stages[REFRESH].program.inputs[: document["inputs"]],
            str(document["timestep"]),
            str(document["name"]),
            tuple(map(str, document["notes"])),
            int(document["extrapolation"]),
        )
        plan.check()
    return plan


def _example(program: Program) -> dict[str, Tensor]:
    return {str(i): leaf for i, leaf in enumerate(program.example) if isinstance(leaf, Tensor) and not leaf.is_meta}


class _Store:
    """Tensors of several stages, each once, by a name of its own."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}

    def put(self, stage: str, name: str, tensor: Tensor) -> str:
        """Return the name that a stage's tensor is stored by: its own, unless another one has it."""
        free = name if name not in self.tensors else f"{stage}/{name}"
        stored = self._names.setdefault(tensor_identity(tensor), free)
        self.tensors[stored] = tensor
        return stored


def _rebuilt(document: Mapping[str, Any], tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> Program:
    example = [
        restore(f"example input {i}", leaf["tensor"], stored.get(str(i)))
        if "tensor" in leaf
        else decode(leaf["constant"])
        for i, leaf in enumerate(document["example"])
    ]
    program, table = decode_program(document, tensors, example)
    check_recorded(program, table)
    return program


@contextmanager
def _reading(folder: Path, file: Path, document: Mapping[str, Any]) -> Iterator[None]:
    """Say of what is wrong inside which directory it is in."""
    try:
        yield
    except (ArtifactError, PreconditionError) as err:
        raise ArtifactError(f"{folder}: {err}") from err
    except VerificationError as err:
        raise ArtifactError(
            f"{folder}: the program does not verify; it was saved with torch {document['torch']}, this is torch "
            f"{torch.__version__}: {err}"
        ) from err
    except DAMAGE as err:
        raise ArtifactError(f"{file} is damaged: {type(err).__name__}: {err}") from err


def check_recorded(program: Program, table: SymbolTable) -> None:
    """Verify a decoded program with its symbolic sizes at their examples, so that those are compared too.

    Raises:
        VerificationError: An operator refuses its inputs or gives another shape or dtype than recorded.
    """
    if any("unbacked_bindings" in node.meta for node in program.nodes):
        verify(program)
        return
    static = program.copy()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in static.nodes:
            if "val" in node.meta:
                node.meta["val"] = at_example_sizes(node.meta["val"], table)
    verify(static)
