"""Run a plan as a module: it is called like the denoiser, and finds out by itself where in a sampling run it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import InputError, PreconditionError
from .schedules import REFRESH

if TYPE_CHECKING:
    from .plan import Staged

Signature = tuple[tuple[Any, ...], ...]
# So many times or fewer are read as a list, which takes one call of torch; an index and a number take two.
SHORT = 512


@dataclass
class Run:
    """Where one sampling run is.

    Attributes:
        index: Evaluations so far.
        time: Of the evaluation before, where times had to be read.
        grid: What the clock gave when the run began.
        first: Place of the first evaluation in the grid, if times come from its memory.
        doubtful: Whether it began because the first time of a run came a second time.
        registers: What is kept, by name: evaluations and values, the latest last.
        shapes: Names, shapes, dtypes and devices of the inputs that the registers were written for.
        history: Stages that ran.
    """

    index: int = 0
    time: float = 0.0
    grid: Any = None
    first: int | None = None
    doubtful: bool = False
    registers: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    shapes: Signature = ()
    history: list[str] = field(default_factory=list)


class PlanModule(nn.Module):
    """A plan as a module with the call signature of the denoiser it was made from.

    A new run begins when the time goes back against its order, after `reset`, after an evaluation that raised, and, with
    a clock, when the sampler has made a new grid of times. Inputs of other shapes, dtypes or devices than before (another
    resolution, guidance switched off) make an evaluation a full one.

    Without a clock a run that was stopped from outside and followed by one that starts at a later time looks like one
    run: call `reset` between them. A pipeline that evaluates conditions apart has to say so with `cache_context`, as for
    the caches of diffusers.

    Args:
        plan: Is not copied: its programs' tensors are the module's.
        clock: Returns the sampler's grid of times, such as ``lambda: pipe.scheduler.timesteps``. Another object means a
            new run; its length is the number of evaluations.
        ascending: Whether times grow in a run. Denoisers of diffusion models go from large times to small ones.
    """

    def __init__(
        self, plan: Staged[Any], clock: Callable[[], Sequence[Any]] | None = None, ascending: bool = False
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({name: stage.program.module(flat=True) for name, stage in plan.stages.items()})
        self.__dict__["plan"] = plan
        self._time = next(i for i, spec in enumerate(plan.inputs) if spec.name == plan.timestep)
        # In the order of the stage's inputs, of which the first are the denoiser's.
        self._reads = {
            name: tuple(spec.name for spec in stage.program.inputs[len(plan.inputs) :])
            for name, stage in plan.stages.items()
        }
        self._clock, self._ascending = clock, ascending
        self._runs: dict[str, Run] = {}
        self._context = ""
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate: inputs and result are those of the denoiser.

        Raises:
            InputError: An input is not what was captured, or the denoiser is called twice at every time without
                `cache_context`.
            PreconditionError: The run has more evaluations than the schedule.
        """
        plan: Staged[Any] = self.__dict__["plan"]
        leaves = plan.stages[REFRESH].program.flatten(*args, **kwargs)
        run = self._at(plan, leaves)
        name = plan.schedule.program(run.index)
        stage = plan.stage(name)
        shapes = tuple((v.shape, v.dtype, v.device) for v in leaves if isinstance(v, Tensor))
        if stage.reads and (run.shapes != shapes or any(register not in run.registers for register in stage.reads)):
            name, stage = REFRESH, plan.stages[REFRESH]
        # A run is known again only once its evaluation is through.
        self._runs.pop(self._context)
        registers = {register: _value(run.registers[register], run.index) for register in self._reads[name]}
        if registers:
            form = (shapes, *((value.shape, value.dtype) for value in registers.values()))
            stage.program.check(form, *args, **kwargs, **registers)
        if stage.writes:
            _forget(run, stage.writes, shapes, plan.extrapolation)
        result, written = plan.split(name, self.stages[name](*leaves, *registers.values()))
        for register, value in written.items():
            run.registers[register] = [*run.registers.get(register, ()), (run.index, value)][-1 - plan.extrapolation :]
        run.index += 1
        run.history.append(name)
        self._runs[self._context] = run
        return result

    def reset(self) -> None:
        """Forget every run; the next evaluation is the first of a new one."""
        self._runs.clear()

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Let the evaluations inside be those of a run of their own, such as ``cond`` and ``uncond``."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def history(self, context: str = "") -> tuple[str, ...]:
        """Return the stages that ran in the present run."""
        run = self._runs.get(context)
        return tuple(run.history) if run else ()

    def contexts(self) -> tuple[str, ...]:
        """Return the names that `cache_context` gave to the present runs; an empty one for evaluations outside of any."""
        return tuple(self._runs)

    def kept_bytes(self) -> int:
        """Return the bytes of all that is kept now, of all runs."""
        values = [value for run in self._runs.values() for kept in run.registers.values() for _, value in kept]
        return sum(value.numel() * value.element_size() for value in values)

    def _at(self, plan: Staged[Any], leaves: list[Any]) -> Run:
        """Return the run that an evaluation belongs to, a new one or the one there is."""
        time = leaves[self._time]
        run = self._runs.get(self._context)
        grid = self._clock() if self._clock is not None else None
        place = _place(time, grid)
        known = run is not None and run.grid is grid and run.first is not None
        if grid is not None and place is not None and not known:
            run = Run(grid=grid, first=place)
            _require_length(plan, len(grid) - place)
        elif run is None or not known:
            run = self._by_time(plan, run, _first(time), grid)
        elif place is None or run.first is None or place - run.first != run.index:
            raise InputError(
                f"evaluation {run.index} of {plan.name} is not at the next time of its pipeline's sampler; a pipeline of "
                "its own needs a cache of its own, calls for several conditions need cache_context, and reset() "
                "begins anew"
            )
        self._runs[self._context] = run
        return run

    def _by_time(self, plan: Staged[Any], run: Run | None, time: float, grid: Any) -> Run:
        again = run is not None and run.index == 1 and time == run.time
        back = run is not None and (time < run.time if self._ascending else time > run.time)
        if run is None or again or back or run.grid is not grid:
            run = Run(grid=grid, doubtful=again and grid is None)
            if grid is not None:
                places = [i for i, t in enumerate(grid) if float(t) == time]
                _require_length(plan, len(grid) - (places[0] if places else 0))
        elif run.doubtful and run.index == 2 and time == run.time:
            self._runs.pop(self._context)
            raise InputError(
                f"{plan.name} is called twice at every time, so it is not clear what was kept for which condition; wrap "
                "the calls in cache_context('cond') and cache_context('uncond'), or evaluate both as one batch"
            )
        run.time = time
        return run

    def extra_repr(self) -> str:
        return f"plan of {self.__dict__['plan'].name}"


def _forget(run: Run, writes: Sequence[str], shapes: Signature, extrapolation: int) -> None:
    """Drop what an evaluation is going to replace, so that its memory serves the new values."""
    if run.shapes != shapes:
        run.registers.clear()
        run.shapes = shapes
    for register in writes:
        kept = run.registers.pop(register, [])
        if extrapolation and kept:
            run.registers[register] = kept[-extrapolation:]


def _value(kept: Sequence[tuple[int, Tensor]], evaluation: int) -> Tensor:
    """Return the value at an evaluation of the polynomial through all that is kept (Lagrange's form)."""
    if len(kept) == 1:
        return kept[0][1]
    value = None
    for place, written in kept:
        weight = math.prod((evaluation - other) / (place - other) for other, _ in kept if other != place)
        value = weight * written if value is None else value + weight * written
    assert value is not None
    return value


def _first(time: Tensor) -> float:
    """Return the first value of the tensor of times."""
    if time.dim() == 1 and 0 < time.numel() <= SHORT:
        return float(time.tolist()[0])
    return float(time[(0,) * time.dim()])


def _place(time: Tensor, grid: Any) -> int | None:
    """Return where ``time`` lies in the grid's own memory, None if it does not; reads no values, so waits for none."""
    if not isinstance(grid, Tensor) or grid.dim() != 1 or grid.is_meta or time.is_meta:
        return None
    if time.device != grid.device or time.untyped_storage().data_ptr() != grid.untyped_storage().data_ptr():
        return None
    return (time.storage_offset() - grid.storage_offset()) // max(grid.stride(0), 1)


def _require_length(plan: Staged[Any], left: int) -> None:
    """Raise `PreconditionError` if the rest of a run has another length than the schedule is for."""
    if plan.schedule.evaluations not in (None, left):
        raise PreconditionError(
            f"the schedule is for runs of {plan.schedule.evaluations} evaluations, and the sampler will make {left}; set "
            f"it to {plan.schedule.evaluations} steps, or make a schedule for {left}"
        )
