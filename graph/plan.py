"""`Plan`: programs that hand tensors from one evaluation of a denoiser to a later one.

A plan is named programs, *registers* and a schedule. A register is a tensor that one program returns and another takes:
in a program it is one keyword input, or one entry of the second result, by the register's name. So every program is
complete in itself, and can be verified, rewritten, exported and run like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from .cost import cost
from .errors import PreconditionError
from .interface import Evaluable, InputSpec
from .plan_module import PlanModule
from .program import Program
from .schedules import Schedule
from .verify import verify

P = TypeVar("P", bound=Evaluable)


@dataclass(frozen=True)
class Stage(Generic[P]):
    """One program of a plan.

    Attributes:
        program: Takes the denoiser's inputs, then the registers it reads as keywords. If it writes any, it returns
            ``(the denoiser's result, {register: tensor})``.
        reads: Registers it takes.
        writes: Registers it returns.
    """

    program: P
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass
class Staged(Generic[P]):
    """Named stages and the schedule they run by, whatever runs the programs: a graph, or a file in some runtime.

    Attributes:
        stages: By the names that the schedule uses.
        schedule: Which stage runs at which evaluation.
        inputs: The denoiser's inputs, without registers.
        timestep: Name of the input that says how far a run is.
        name: Class name of the denoiser.
        notes: What was decided when the plan was made, one sentence each.
        extrapolation: Order of the polynomial through the last values of a register, of which a stage that reads it gets
            the value now (TaylorSeer, arXiv 2503.06923). 0 gives it the last value. A register then takes as many
            times its memory, and one more.
    """

    stages: dict[str, Stage[P]]
    schedule: Schedule
    inputs: tuple[InputSpec, ...]
    timestep: str
    name: str
    notes: tuple[str, ...] = field(default=())
    extrapolation: int = 0

    @property
    def registers(self) -> dict[str, InputSpec]:
        """Name, dtype and shape of every register that is read."""
        return {
            spec.name: spec
            for stage in self.stages.values()
            for spec in stage.program.inputs
            if spec.name in stage.reads
        }

    def module(self, clock: Callable[[], Sequence[Any]] | None = None, ascending: bool = False) -> PlanModule:
        """Return a module with the denoiser's call signature that runs the plan; see `PlanModule`."""
        return PlanModule(self, clock, ascending)

    def stage(self, name: str) -> Stage[P]:
        """Return a stage by name.

        Raises:
            PreconditionError: There is none of this name.
        """
        if name not in self.stages:
            raise PreconditionError(f"the schedule names '{name}', which is no stage; stages: {', '.join(self.stages)}")
        return self.stages[name]

    def split(self, name: str, result: Any) -> tuple[Any, dict[str, Tensor]]:
        """Take apart what a stage's program returned: the denoiser's result, and the registers it wrote."""
        return result if self.stages[name].writes else (result, {})


@dataclass
class Plan(Staged[Program]):
    """Named programs and the schedule they run by."""

    def copy(self) -> Plan:
        """Return a plan whose programs can be rewritten on their own; tensors are shared, as values."""
        return replace(
            self, stages={name: replace(stage, program=stage.program.copy()) for name, stage in self.stages.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every parameter and buffer of every stage, by name; stages share them."""
        return {name: t for stage in self.stages.values() for name, t in stage.program.tensors().items()}

    def macs(self) -> dict[str, int]:
        """Return the multiply-accumulates of every stage at the example's sizes, attention products included."""
        return {name: cost(stage.program).total_macs for name, stage in self.stages.items()}

    def check(self) -> None:
        """Check the plan as a whole, then every program.

        Raises:
            PreconditionError: The first evaluation reads a register, a register that is read is written nowhere, or a
                name in the schedule has no stage.
            VerificationError: A program is inconsistent.
        """
        written = {name for stage in self.stages.values() for name in stage.writes}
        for name, stage in self.stages.items():
            if missing := [register for register in stage.reads if register not in written]:
                raise PreconditionError(f"stage '{name}' reads the register '{missing[0]}', which no stage writes")
        held: set[str] = set()
        for i in range(self.schedule.evaluations or 1):
            stage = self.stage(self.schedule.program(i))
            if missing := [register for register in stage.reads if register not in held]:
                raise PreconditionError(
                    f"evaluation {i} runs '{self.schedule.program(i)}', which reads the register '{missing[0]}' that no "
                    "evaluation before it writes; let a full evaluation run before"
                )
            held |= set(stage.writes)
        for stage in self.stages.values():
            verify(stage.program)
