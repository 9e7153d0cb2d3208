"""The model that a recipe names: loaded, converted, with example inputs, and a key that changes when it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from ..frontends.cache import Captured, capture_or_load
from ..frontends.capture import capture
from ..frontends.load_model import load_model
from ..passes.options import plain
from .facts import code_hash, inputs_hash, versions, weights_hash
from .recipe_schema import InputTensor, Recipe


@dataclass
class Source:
    """A loaded model with example inputs."""

    spec: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: Mapping[str, Mapping[int, str]] | None
    notes: tuple[str, ...] = ()

    def capture(self, cache_dir: Path | None = None) -> Captured:
        """Capture the model; the program's notes are those of loading and of capturing.

        Args:
            cache_dir: Where captured graphs are kept; None captures anew and keeps nothing.
        """
        if cache_dir is None:
            found = Captured(capture(self.model, self.args, self.kwargs, self.dynamic), False)
        else:
            found = capture_or_load(self.model, self.args, self.kwargs, self.dynamic, cache_dir)
        return found._replace(program=replace(found.program, notes=(*self.notes, *found.program.notes)))

    def key(self) -> dict[str, Any]:
        """Return plain data that is the same only for the same model, inputs and library versions."""
        return {
            "model": self.spec,
            "class": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "weights": weights_hash(self.model),
            "code": code_hash(self.model, self.spec),
            "inputs": inputs_hash(pytree.tree_leaves((self.args, self.kwargs))),
            "dynamic": {k: {str(d): n for d, n in v.items()} for k, v in (self.dynamic or {}).items()}
            if self.dynamic is not None
            else None,
            "versions": versions(),
        }


def load_source(recipe: Recipe) -> Source:
    """Load the model of a recipe.

    Raises:
        GraphwrightError: There is no such model, or its inputs are not known.
    """
    inputs = None if recipe.inputs is None else _described(recipe.inputs)
    loaded = load_model(
        recipe.model, dtype=recipe.dtype, random_weights=recipe.random_weights, seed=recipe.seed, inputs=inputs
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
