"""Run a recipe: capture, passes, exports with checks, samples, latency, report; each a stage that a rerun skips."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..frontends.capture import capture
from ..graph.cost import cost
from ..graph.depgraph import depgraph
from ..graph.program import Program
from ..passes.base import Context, Pipeline
from ..passes.options import plain
from . import artifacts
from .compare import differences, dynamic_sizes, second_sizes
from .recipe import Recipe
from .run_dir import Finished, RunDirectory, write_atomic

RESOLVED = "recipe.resolved.yaml"
PACKAGES = ("graphwright", "torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime")


@dataclass
class Loaded:
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: Any = None
    source: str = ""


def load(spec: str) -> Any:
    try:
        from ..frontends.load_model import load_model
    except ModuleNotFoundError:
        if spec.startswith("builtin:"):
            from ..frontends.builtin import load_builtin

            return Loaded(*load_builtin(spec), source=spec)
        module, _, name = spec.partition(":")
        return Loaded(*getattr(import_module(module), name)(), source=spec)
    return load_model(spec)


class Silent:
    """What a run tells nobody."""

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        yield

    def progress(self, what: str, done: int, total: int) -> None: ...

    def finished(self, stage: Finished) -> None: ...


@dataclass
class Runner:
    recipe: Recipe
    out: Path
    ui: Any = field(default_factory=Silent)

    def __call__(self) -> dict[str, Any]:
        self.directory = RunDirectory.open(self.out, self.recipe.name)
        write_atomic(self.out / RESOLVED, self.recipe.to_yaml())
        self.stages: list[Finished] = []
        first = self._do("capture", "capture the model", self._capture_inputs(), self._capture)
        key = first.key
        self.original = self.program
        for i, step in enumerate(self.recipe.passes, 1):
            inputs = {"before": key, "pass": step.name, "options": plain(step), "seed": self.recipe.seed}
            key = self._do(f"{i}-{step.name}", f"apply {step}", inputs, lambda folder, s=step: self._pass(s, folder)).key
        if self.recipe.export.onnx:
            self._do("onnx", "export to ONNX and compare", {"before": key, "options": plain(self.recipe.export.onnx), "check": plain(self.recipe.check)}, self._onnx)
        return {s.name: s.result for s in self.stages}

    def _do(self, name: str, what: str, inputs: Any, work: Callable[[Path], Any]) -> Finished:
        with self.ui.stage(name, what):
            done = self.directory.do(name, inputs, work)
        self.stages.append(done)
        self.ui.finished(done)
        return done

    @cached_property
    def loaded(self) -> Any:
        return load(self.recipe.model)

    def _capture_inputs(self) -> Any:
        return {"model": self.recipe.model, "weights": weights_hash(self.loaded.model), "versions": versions()}

    def _capture(self, folder: Path) -> Any:
        loaded = self.loaded
        self.program = capture(loaded.model, loaded.args, loaded.kwargs, loaded.dynamic)
        graph = depgraph(self.program)
        return {"name": self.program.name, "notes": list(self.program.notes), "groups": len(graph.groups)}

    def _pass(self, step: Any, folder: Path) -> Any:
        result = Pipeline([step])(self.program, Context(progress=self.ui.progress))
        self.program = result.output
        record = result.records[0]
        return {"text": record.text, "stats": dict(record.result.stats)}

    def _onnx(self, folder: Path) -> Any:
        artifacts.export_onnx(self.program, folder)
        run = artifacts.onnx_runner(folder, self.program)
        checks = [differences(self.program, run, dynamic_sizes(self.program))]
        more = second_sizes(self.program, self.recipe.check.second_shape)
        if more:
            checks.append(differences(self.program, run, more))
        return {"checks": checks, "ok": all(c["max_rel"] <= self.recipe.check.tolerance for c in checks)}


def weights_hash(model: nn.Module) -> str:
    """Return a hash of every parameter and buffer, names included."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what takes part in a run."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
