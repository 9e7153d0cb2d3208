"""The model that a recipe names: loaded, converted, with example inputs, and a key that changes when it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from ..frontends.cache import Captured, capture_key, capture_or_load
from ..frontends.capture import capture
from ..frontends.load_model import load_model
from ..graph.document_files import PLAN_FORM, PROGRAM_FORM
from ..graph.errors import ArtifactError, PreconditionError
from ..graph.files import sha256
from ..graph.plan import Plan
from ..graph.program import Program
from ..passes.options import plain
from .facts import inputs_hash, key_or_never, versions, weights_hash
from .outputs import load_output
from .recipe_schema import InputTensor, Recipe
from .run_dir import MARK, RunDirectory


@dataclass
class Source:
    """A loaded model with example inputs.

    Attributes:
        spec: What was asked for.
        model: The module.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        dynamic: Names of the dimensions that vary, as `capture` takes them.
        notes: What loading has to say.
        program: The program, where it was saved as one and nothing about it is to be changed.
    """

    spec: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: Mapping[str, Mapping[int, str]] | None
    notes: tuple[str, ...] = ()
    program: Program | None = None

    def capture(self, cache_dir: Path | None = None) -> Captured:
        """Capture the model; the program's notes are those of loading and of capturing.

        Args:
            cache_dir: Where captured graphs are kept; None captures anew and keeps nothing.
        """
        if self.program is not None:
            return Captured(self.program, False)
        if cache_dir is None:
            found = Captured(capture(self.model, self.args, self.kwargs, self.dynamic), False)
        else:
            found = capture_or_load(self.model, self.args, self.kwargs, self.dynamic, cache_dir)
        return found._replace(program=replace(found.program, notes=(*self.notes, *found.program.notes)))

    def _code(self) -> str:
        if self.program is not None:
            return sha256((program_folder(self.spec) or Path(self.spec)) / PROGRAM_FORM.file)
        return capture_key(self.model, self.args, self.kwargs, self.dynamic)

    def key(self) -> dict[str, Any]:
        """Return plain data that is the same only for the same model, inputs and library versions."""
        return {
            "model": self.spec,
            "class": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "weights": weights_hash(self.model),
            "code": key_or_never(self.spec, self._code),
            "inputs": inputs_hash(pytree.tree_leaves((self.args, self.kwargs))),
            "dynamic": {k: {str(d): n for d, n in v.items()} for k, v in (self.dynamic or {}).items()}
            if self.dynamic is not None
            else None,
            "versions": versions(),
        }


def program_folder(spec: str) -> Path | None:
    """Return the directory of what a run has come to, or of a saved program or plan; None for any other model.

    Raises:
        ArtifactError: The run has not captured its model yet.
    """
    path = Path(spec).expanduser()
    if (path / MARK).is_file():
        run = RunDirectory.existing(path)
        holders = run.holders()
        if not holders:
            raise ArtifactError(f"the run in {path} has not captured its model yet; run it again")
        return run.program(holders[-1])
    return path if any((path / form.file).is_file() for form in (PROGRAM_FORM, PLAN_FORM)) else None


def load_source(recipe: Recipe) -> Source:
    """Load the model of a recipe.

    The program of a run or of a saved program is taken as it is; where the recipe gives inputs, dynamic dimensions or a
    dtype, it is captured anew with those.

    Raises:
        GraphwrightError: There is no such model, or its inputs are not known.
    """
    folder = program_folder(recipe.model)
    if folder is not None and recipe.inputs is recipe.dynamic is recipe.dtype is None:
        program = load_output(folder)
        if isinstance(program, Plan):
            raise PreconditionError(
                f"{recipe.model} holds a plan of {len(program.stages)} programs ({', '.join(program.stages)}), and one program "
                "is needed here; graphwright export and check take plans, other passes go before the one that makes the plan"
            )
        return Source(recipe.model, program.module(), *program.example_inputs(), None, program=program)
    inputs = None if recipe.inputs is None else _described(recipe.inputs)
    loaded = load_model(
        str(folder or recipe.model),
        dtype=recipe.dtype,
        random_weights=recipe.random_weights,
        seed=recipe.seed,
        inputs=inputs,
    )
    dynamic = loaded.dynamic if recipe.dynamic is None else recipe.dynamic
    return Source(recipe.model, loaded.model, loaded.args, loaded.kwargs, dynamic, loaded.notes)


def _described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a recipe as `load_model` takes them: only what was said."""
    return {
        name: {key: value for key, value in plain(entry).items() if value is not None and value != {}}
        if isinstance(entry, InputTensor)
        else entry
        for name, entry in inputs.items()
    }
