"""Run a recipe: capture, passes, exports, samples, latency and the report, each a stage that a rerun skips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from ..graph.depgraph import depgraph
from ..graph.errors import GraphwrightError
from ..passes.base import Context, Pass
from ..passes.options import plain
from ..passes.text import show
from . import artifacts
from .calibration import context_of
from .factories import factory_key
from .facts import cost_facts, frozen_facts, group_facts, input_facts, machine
from .latency import measure, torch_threads
from .outputs import Output, denoiser_of, load_output, save_output
from .recipe_schema import Factory, Measure, Recipe
from .run_calls import Candidate, bound_calls, models
from .run_dir import PROGRAM, Finished, RunDirectory, hash_of, pass_stage, write_atomic
from .run_pass import program_or_none, removal_so_far, run_pass
from .samples import draw_samples
from .source import Source, load_source

RESOLVED, CHECKPOINTS = "recipe.resolved.yaml", "checkpoints"
CAPTURE, ONNX, ONNX_ORIGINAL, TORCHSCRIPT = "capture", "onnx", "onnx-original", "torchscript"
SAMPLES, LATENCY = "samples", "latency"


class Ui(Protocol):
    """What a run tells whoever watches it."""

    def begin(self, name: str, what: str) -> None:
        """A stage begins; it may turn out to be done already."""

    def end(self, stage: Finished) -> None:
        """The stage is done."""

    def fail(self, name: str, error: Exception) -> None:
        """The stage failed; the run goes on with what does not need it."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Part of a long stage is done."""


class Silent:
    """A `Ui` that tells nobody."""

    def begin(self, name: str, what: str) -> None: ...

    def end(self, stage: Finished) -> None: ...

    def fail(self, name: str, error: Exception) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        recipe: What was run.
        directory: Where.
        stages: The finished stages in order.
        failures: Why a stage failed, by its name.
    """

    recipe: Recipe
    directory: Path
    stages: tuple[Finished, ...]
    failures: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether every stage was done."""
        return not self.failures

    def __getitem__(self, name: str) -> Finished:
        """Return the finished stage ``name``."""
        return next(stage for stage in self.stages if stage.name == name)

    def __contains__(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)


@dataclass
class Runner:
    """Runs one recipe in one directory. `__call__` may be called once.

    Attributes:
        recipe: What to run.
        out: The directory.
        ui: Who is told how it goes.
        cache_dir: Where captured graphs are kept for other runs; None captures anew.
    """

    recipe: Recipe
    out: Path
    ui: Ui = field(default_factory=Silent)
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        self._stages: list[Finished] = []
        self._failures: dict[str, str] = {}
        self._outputs: dict[str, Output] = {}

    def __call__(self) -> Outcome:
        """Do every stage that is not done yet.

        Raises:
            GraphwrightError: The model cannot be captured, a pass refuses or fails, or the directory is not usable.
                What is finished by then stays, and the next run goes on from there.
        """
        # First, so that a factory with a wrong name costs no time.
        self._factories = {
            name: factory_key(name, getattr(self.recipe, name))
            for name in ("calibration", "training", "sampling", "samples")
        }
        self._directory = RunDirectory.open(self.out, self.recipe.name)
        with self._directory.locked():
            write_atomic(self.out / RESOLVED, self.recipe.to_yaml())
            self._directory.keep_only(set(self._names()))
            before = self._captured()
            for index, step in enumerate(self.recipe.passes):
                before = self._passed(index, step, before)
            self._exported(before)
            if self.recipe.samples is not None:
                self._sampled(self.recipe.samples, before)
            if self.recipe.measure is not None:
                self._measured(self.recipe.measure, before)
        return Outcome(self.recipe, self.out, tuple(self._stages), self._failures)

    def _names(self) -> Iterator[str]:
        yield from (CAPTURE, ONNX, ONNX_ORIGINAL, TORCHSCRIPT, SAMPLES, LATENCY)
        yield from (pass_stage(i, step.name) for i, step in enumerate(self.recipe.passes))

    def _do(self, name: str, what: str, inputs: Any, work: Callable[[Path], Any]) -> Finished:
        self.ui.begin(name, what)
        with seeded(self.recipe.seed):
            stage = self._directory.do(name, inputs, work)
        self._stages.append(stage)
        self.ui.end(stage)
        return stage

    def _try(self, name: str, what: str, inputs: Any, work: Callable[[Path], Any]) -> None:
        """Do a stage that nothing else stands on: its failure fails the run but does not stop it."""
        try:
            self._do(name, what, inputs, work)
        except GraphwrightError as err:
            self._directory.forget(name)
            self._failures[name] = str(err)
            self.ui.fail(name, err)

    def _output(self, stage: Finished) -> Output:
        """Return the program or plan that a stage left, from memory or from its directory."""
        holder = stage.result["program"]
        if holder not in self._outputs:
            self._outputs[holder] = load_output(self._directory.program(holder))
        return self._outputs[holder]

    def _keep(self, holder: str, output: Output, folder: Path) -> None:
        save_output(output, folder / PROGRAM)
        self._outputs[holder] = output

    # ------------------------------------------------------------------ stages

    @cached_property
    def _source(self) -> Source:
        return load_source(self.recipe)

    def _captured(self) -> Finished:
        def work(folder: Path) -> Any:
            program, from_cache = self._source.capture(self.cache_dir)
            graph = depgraph(program)
            self._keep(CAPTURE, program, folder)
            return {
                "program": CAPTURE,
                "from_cache": from_cache,
                "name": program.name,
                "notes": list(program.notes),
                "inputs": input_facts(program),
                "cost": cost_facts(program),
                "groups": group_facts(graph),
                "frozen": frozen_facts(graph),
                "unknown": list(graph.unknown),
                "versions": self._source.key()["versions"],
            }

        self.ui.begin("load", f"load {self.recipe.model}")
        return self._do(CAPTURE, "capture the model", {**self._source.key(), "seed": self.recipe.seed}, work)

    def _passed(self, index: int, step: Pass, before: Finished) -> Finished:
        name = pass_stage(index, step.name)

        def work(folder: Path) -> Any:
            context = replace(
                self._context,
                checkpoints=checkpoints,
                original=program_or_none(self._output(self._stages[0])),
                removal=removal_so_far(self.out, self._stages),
            )
            output, facts = run_pass(step, self._output(before), context, folder)
            if facts["modified"]:
                self._keep(name, output, folder)
            return {"program": name if facts["modified"] else before.result["program"], **facts}

        inputs = {
            "before": before.key,
            "pass": step.name,
            "options": plain(step),
            "calibration": self._factories["calibration"],
            "training": self._factories["training"],
            "sampling": self._factories["sampling"],
        }
        # By what the stage depends on: a checkpoint of another training is never taken up.
        checkpoints = self.out / CHECKPOINTS / hash_of(inputs)[:16]
        return self._do(name, show(step), inputs, work)

    @cached_property
    def _context(self) -> Context:
        return context_of(self.recipe, self.ui.progress)

    def _exported(self, last: Finished) -> None:
        onnx, check = self.recipe.export.onnx, self.recipe.check
        first = self._stages[0]
        if onnx is not None:
            inputs = {"options": plain(onnx), "check": plain(check)}
            if onnx.original and first.result["program"] != last.result["program"]:
                self._try(
                    ONNX_ORIGINAL,
                    "export the original to ONNX",
                    {"before": first.key, **inputs},
                    lambda folder: artifacts.export_onnx(self._output(first), folder, onnx, check),
                )
            self._try(
                ONNX,
                "export to ONNX",
                {"before": last.key, **inputs},
                lambda folder: artifacts.export_onnx(self._output(last), folder, onnx, check),
            )
        if self.recipe.export.torchscript is not None:
            self._try(
                TORCHSCRIPT,
                "export to TorchScript",
                {"before": last.key, "check": plain(check)},
                lambda folder: artifacts.export_torchscript(self._output(last), folder, check),
            )

    def _candidates(self, last: Finished) -> list[Candidate]:
        """Return what there is to call: the original, and what came out of it."""
        first = self._stages[0]
        labels = {"original": (first, ONNX_ORIGINAL), "result": (last, ONNX)}
        if first.result["program"] == last.result["program"]:
            labels.pop("original")
        exported = {stage.name for stage in self._stages}
        providers = self.recipe.export.onnx.providers if self.recipe.export.onnx else None
        return [
            Candidate(label, self._output(stage), self.out / export if export in exported else None, providers)
            for label, (stage, export) in labels.items()
        ]

    def _done(self) -> dict[str, str]:
        return {stage.name: stage.key for stage in self._stages if stage.name != SAMPLES}

    def _sampled(self, options: Factory, last: Finished) -> None:
        def work(folder: Path) -> Any:
            program = denoiser_of(self._output(last))
            return draw_samples(options, program, models(self._candidates(last)), folder, self.ui.progress)

        inputs = {"after": self._done(), "options": self._factories["samples"]}
        self._try(SAMPLES, "draw samples", inputs, work)

    def _measured(self, options: Measure, last: Finished) -> None:
        def work(folder: Path) -> Any:
            with torch_threads(options.threads) as threads, torch.no_grad():
                calls = bound_calls(self._candidates(last), options.threads, options.batch)
                times = measure(calls, options.runs, self.ui.progress)
            return {"times": times, "threads": threads, "batch": options.batch, "machine": machine()}

        inputs = {"after": self._done(), "options": plain(options), "machine": machine()}
        self._try(LATENCY, "measure latency", inputs, work)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside the block and leave the global state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
