"""The model that a recipe names: loaded, converted, with example inputs, and a key that changes when it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..frontends.capture import capture
from ..frontends.inputs import inputs_from_spec
from ..graph.program import Program
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

    def capture(self) -> Program:
        """Capture the model."""
        return capture(self.model, self.args, self.kwargs, self.dynamic)

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
        GraphwrightError: There is no such model, or its inputs do not fit.
    """
    try:
        from ..frontends.load_model import load_model  # pyright: ignore
    except ModuleNotFoundError:
        from types import SimpleNamespace
        from importlib import import_module

        def load_model(spec):
            if spec.startswith("builtin:"):
                from ..frontends.builtin import load_builtin

                m, a, k = load_builtin(spec)
            else:
                mod, _, n = spec.partition(":")
                m, a, k = getattr(import_module(mod), n)()
            return SimpleNamespace(model=m, args=a, kwargs=k, dynamic=None)

    loaded = load_model(recipe.model)
    model, args, kwargs = loaded.model, tuple(loaded.args), dict(loaded.kwargs)
    dynamic = loaded.dynamic
    if recipe.inputs is not None:
        args, kwargs, dynamic = inputs_from_spec(_described(recipe.inputs), seed=recipe.seed)
    if recipe.dtype is not None:
        dtype: torch.dtype = getattr(torch, recipe.dtype)
        model = model.to(dtype)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.dtype.is_floating_point else t, (args, kwargs)
        )
    return Source(recipe.model, model, args, kwargs, recipe.dynamic if recipe.dynamic is not None else dynamic)


def _described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a recipe as `inputs_from_spec` takes them: only what was said."""
    return {
        name: {key: value for key, value in plain(entry).items() if value is not None and value != {}}
        if isinstance(entry, InputTensor)
        else entry
        for name, entry in inputs.items()
    }
