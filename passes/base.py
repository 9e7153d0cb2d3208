"""The pass protocol: a pass is a frozen dataclass that rewrites a Program in place and says what it did."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor

from ..graph.errors import GraphwrightError, PreconditionError, VerificationError
from ..graph.plan import Plan
from ..graph.program import Program
from ..graph.resize import RemovalRecord
from ..graph.verify import verify
from .text import show

T = TypeVar("T")
Loss = Callable[[Program, Any], Tensor]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Skipped:
    """A site the pass looked at and left alone, with the reason."""

    site: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        modified: Whether the graph or any parameter differs from the input.
        stats: Named counts, in the unit the name states.
        skipped: Sites that matched but were refused, each with a reason.
        removal: Which indices stayed, for passes that shrink tensors.
        output: What the program became, for passes that make several programs of it; the program is one of them.
    """

    modified: bool
    stats: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    skipped: tuple[Skipped, ...] = ()
    removal: RemovalRecord | None = None
    output: Plan | None = None


@dataclass
class Context:
    """Per-run state: what passes may use beyond the program, and cached analyses. Passes hold none themselves.

    Attributes:
        loss: Calibration loss: ``loss(program, batch)`` returns a scalar tensor; it calls the program like the model.
        batches: Calibration batches, each passed to ``loss`` as it is.
        split: Takes a batch apart into samples, for criteria that need one gradient per sample (``hessian``, ``obdc``);
            each is passed to ``loss``. Without it every batch counts as one sample.
        training: Batches to train on, gone through again and again, each passed to the loss as it is.
        training_loss: Of the training; None for ``loss``.
        sample: Sampling loop of a denoiser, for passes that learn on sampling runs: ``sample(denoise, generator)`` calls
            ``denoise`` as the model is called.
        latency: Measures a program in seconds of a call, for passes that make it faster by a given fraction.
        progress: Called with ``(what, done, total)`` during long work.
        checkpoints: Directory where long work leaves what it has done, so that it can go on after an interruption.
        original: The program before all passes, the teacher of a distillation; a `Pipeline` fills it in.
        removal: What the passes so far removed from the original; a `Pipeline` fills it in.
    """

    loss: Loss | None = None
    batches: Sequence[Any] = ()
    split: Callable[[Any], Sequence[Any]] | None = None
    training: Iterable[Any] | None = None
    training_loss: Loss | None = None
    sample: Callable[[Any, torch.Generator], Any] | None = None
    latency: Callable[[Program], float] | None = None
    progress: Progress | None = None
    checkpoints: Path | None = None
    original: Program | None = None
    removal: RemovalRecord = field(default_factory=RemovalRecord)
    _cache: dict[Callable[[Program], Any], tuple[int, Program, Any]] = field(default_factory=dict, repr=False)

    def analysis(self, fn: Callable[[Program], T], program: Program) -> T:
        """Return ``fn(program)``, computed at most once until the program changes."""
        known = self._cache.get(fn)
        if known is None or known[0] != program.version or known[1] is not program:
            self._cache[fn] = (program.version, program, fn(program))
        return self._cache[fn][2]

    def report(self, what: str, done: int, total: int) -> None:
        """Tell the caller how far long work is."""
        if self.progress is not None:
            self.progress(what, done, total)


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite of one program, in place. Its fields are its whole configuration.

    Attributes:
        name: In recipes and reports.
        only_resizes: Whether `rewrite` changes the program by `resize` alone, which compiles and verifies what it
            leaves, so that doing both once more would find nothing.
        applies_to_plans: Whether each program of a plan can be rewritten for itself.
        only_trains: Whether it changes values of tensors alone, so that plans of widths can leave it out.
    """

    name: ClassVar[str]
    only_resizes: ClassVar[bool] = False
    applies_to_plans: ClassVar[bool] = False
    only_trains: ClassVar[bool] = False

    def requires(self, program: Program) -> None:  # noqa: B027 (a hook, not abstract)
        """Raise `PreconditionError` when ``program`` is outside this pass's domain."""

    @abstractmethod
    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        """Change ``program`` and say what changed."""

    def ensures(self, program: Program, result: PassResult) -> None:  # noqa: B027 (a hook, not abstract)
        """Raise `VerificationError` when the pass's own promise is broken."""

    @final
    def __call__(self, program: Program, ctx: Context | None = None) -> PassResult:
        """Check, rewrite, verify.

        Raises:
            PreconditionError: The program is outside the pass's domain.
            VerificationError: The pass left an inconsistent program.
        """
        self.requires(program)
        before = fingerprint(program)
        result = self.rewrite(program, ctx or Context())
        if not result.modified and fingerprint(program) != before:
            raise VerificationError(f"{self.name} changed the program but reported modified=False")
        if result.output is not None:
            result.output.check()
        elif not (result.modified and self.only_resizes):
            if result.modified:
                program.changed()
            verify(program)
        self.ensures(program, result)
        return result

    @final
    def on_plan(self, plan: Plan, ctx: Context) -> PassResult:
        """Apply the pass to every program of a plan.

        Returns:
            The numbers of all programs added up.

        Raises:
            PreconditionError: The pass can only be applied before a plan is made.
        """
        if not self.applies_to_plans:
            raise PreconditionError(
                f"{self.name} rewrites one program, and the passes before it made a plan of {len(plan.stages)} programs "
                "that share tensors; put it before the pass that makes the plan"
            )
        results = [self(stage.program, ctx) for stage in plan.stages.values()]
        stats = {key: sum(r.stats.get(key, 0) for r in results) for r in results for key in r.stats}
        skipped = tuple(s for r in results for s in r.skipped)
        return PassResult(any(r.modified for r in results), stats, skipped)

    def __str__(self) -> str:
        """Return ``name{option=value, ...}`` with the options that differ from their defaults."""
        return show(self)


def fingerprint(program: Program) -> int:
    """Hash of structure, literals, and the identity and shape of every tensor, to catch a wrong ``modified``."""
    nodes = tuple((n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in program.nodes)
    tensors = tuple((k, id(v), tuple(v.shape), v.dtype) for k, v in program.tensors().items())
    return hash((nodes, tensors))


@dataclass(frozen=True)
class Record:
    """One pass of a pipeline: its text, how long it took, what it did."""

    name: str
    text: str
    seconds: float
    result: PassResult


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline gave.

    Attributes:
        output: The rewritten `Program`, or the `Plan` that a pass made of it; the program passed in is unchanged.
            `program` and `plan` are the same with a type.
        records: One per pass, in order.
    """

    output: Any
    records: tuple[Record, ...]

    @property
    def program(self) -> Program:
        """The output, which must be a program.

        Raises:
            PreconditionError: It is a plan.
        """
        if not isinstance(self.output, Program):
            raise PreconditionError(f"the pipeline made a plan of {len(self.output.stages)} programs: take .plan")
        return self.output

    @property
    def plan(self) -> Plan:
        """The output, which must be a plan.

        Raises:
            PreconditionError: It is a program.
        """
        if not isinstance(self.output, Plan):
            raise PreconditionError("no pass of the pipeline made a plan: take .program")
        return self.output

    @property
    def removal(self) -> RemovalRecord:
        """All removals of all passes as one, in terms of the original indices."""
        total = RemovalRecord()
        for record in self.records:
            if record.result.removal is not None:
                total = total.then(record.result.removal)
        return total

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What any pass refused, with the reasons."""
        return tuple(s for record in self.records for s in record.result.skipped)


@dataclass(frozen=True)
class Pipeline:
    """Passes applied once each, in order, to a copy."""

    passes: Sequence[Pass]

    def __call__(self, program: Program | Plan, context: Context | None = None) -> PipelineResult:
        """Apply the passes to a copy of ``program``, or of a plan that earlier passes made.

        Raises:
            GraphwrightError: What the failing pass raised, with a note of which pass and which came before.
        """
        context = context or Context()
        original = program if isinstance(program, Program) else None
        # A copy, since the caller may use the context for another model; analyses are shared.
        context = replace(context, original=context.original or original)
        records = list[Record]()
        work = program.copy()
        for i, step in enumerate(self.passes):
            context.report(step.name, i, len(self.passes))
            start = time.perf_counter()
            try:
                result = step(work, context) if isinstance(work, Program) else step.on_plan(work, context)
            except GraphwrightError as err:
                done = ", ".join(r.name for r in records) or "none"
                err.add_note(f"in pass {step}; passes already applied: {done}")
                raise
            work = result.output or work
            if result.removal is not None:
                context.removal = context.removal.then(result.removal)
            records.append(Record(step.name, str(step), time.perf_counter() - start, result))
        context.report("done", len(self.passes), len(self.passes))
        return PipelineResult(work, tuple(records))
