"""Schedules: which of a plan's programs runs at which evaluation of a sampling run. They are data, with a JSON form.

An *evaluation* is one call of the denoiser. Most samplers make one a step; solvers of second order make two, and those
count apart. Evaluation 0 is always a full one, since nothing is kept before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from .errors import PreconditionError

REFRESH, REUSE = "refresh", "reuse"


@dataclass(frozen=True)
class Schedule(ABC):
    """Names a program for every evaluation.

    Attributes:
        kind: Name in the JSON form.
    """

    kind: ClassVar[str]

    @property
    def evaluations(self) -> int | None:
        """How many evaluations a run must have; None for any number."""
        return None

    @abstractmethod
    def program(self, evaluation: int) -> str:
        """Return the name of the program that runs at an evaluation, counted from 0."""

    def programs(self, evaluations: int) -> tuple[str, ...]:
        """Return the names for a whole run.

        Raises:
            PreconditionError: The schedule is for another number of evaluations.
        """
        if self.evaluations not in (None, evaluations):
            raise PreconditionError(
                f"the schedule is for runs of {self.evaluations} evaluations, got {evaluations}; set the sampler to "
                f"{self.evaluations}, or make a schedule for {evaluations}"
            )
        return tuple(self.program(i) for i in range(evaluations))

    def encode(self) -> dict[str, Any]:
        """Return the JSON form, which `decode` reads."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Uniform(Schedule):
    """A full evaluation every ``interval``, starting with the first.

    Attributes:
        interval: 1 makes every evaluation a full one.
        per_step: Evaluations that a solver makes a step, which stay together: the interval then counts steps.
    """

    kind: ClassVar[str] = "uniform"
    interval: int
    per_step: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1 or self.per_step < 1:
            raise PreconditionError(f"interval and per_step must be 1 or more, got {self.interval}, {self.per_step}")

    def program(self, evaluation: int) -> str:
        """Return ``refresh`` or ``reuse``."""
        return REFRESH if evaluation // self.per_step % self.interval == 0 else REUSE


@dataclass(frozen=True)
class Listed(Schedule):
    """One program for each evaluation of a run of fixed length.

    Attributes:
        names: The first must be a full evaluation.
    """

    kind: ClassVar[str] = "listed"
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise PreconditionError("a schedule needs one evaluation or more, got none")

    @property
    def evaluations(self) -> int | None:
        """The length of the list."""
        return len(self.names)

    def program(self, evaluation: int) -> str:
        """Return the name at a place of the list.

        Raises:
            PreconditionError: The run is longer than the list.
        """
        if evaluation >= len(self.names):
            raise PreconditionError(
                f"the schedule is for runs of {len(self.names)} evaluations, and this run goes on; set the sampler to "
                f"{len(self.names)}, reset() before a new run, or make a longer schedule"
            )
        return self.names[evaluation]


def at(refreshes: Sequence[int], evaluations: int) -> Listed:
    """Return a schedule with full evaluations at the given places of a run.

    Raises:
        PreconditionError: A place is outside the run, or the first evaluation is no full one.
    """
    places = sorted(set(refreshes))
    if places[:1] != [0]:
        raise PreconditionError(f"evaluation 0 must be a full one, since nothing is kept before it, got {places}")
    if places[-1] >= evaluations:
        raise PreconditionError(f"evaluation {places[-1]} is beyond a run of {evaluations}")
    return Listed(tuple(REFRESH if i in places else REUSE for i in range(evaluations)))


def masked(mask: str | Sequence[bool | int]) -> Listed:
    """Return a schedule from a mask such as ``"1101000"``: 1 is a full evaluation.

    Raises:
        PreconditionError: The mask has another character, or begins with a reuse.
    """
    signs = [c if isinstance(c, str) else str(int(c)) for c in mask]
    if set(signs) - {"0", "1"}:
        raise PreconditionError(f"a mask has a 1 for a full evaluation and a 0 for a reuse, got {mask!r}")
    return at([i for i, c in enumerate(signs) if c == "1"], len(signs))


# Of step masks: evaluations from one full one to the next, once the beginning of a run is through.
STEP_MASKS = {"slow": 2, "medium": 3, "fast": 4, "ultra": 6}
# The share of a run in which pictures get their layout, and every evaluation is a full one.
BEGINNING = 1 / 8


def step_mask(evaluations: int, speed: str = "medium") -> Listed:
    """Return a schedule that computes the first eighth of a run in full, and then every second to sixth evaluation.

    Args:
        evaluations: Of a run.
        speed: A name of `STEP_MASKS`: ``slow``, ``medium``, ``fast`` or ``ultra``.

    Raises:
        PreconditionError: There is no such name, or no evaluation.
    """
    if speed not in STEP_MASKS or evaluations < 1:
        raise PreconditionError(
            f"a step mask needs a run of 1 or more and a speed of {', '.join(STEP_MASKS)}, got {evaluations}, {speed!r}"
        )
    first = max(round(BEGINNING * evaluations), 1)
    regular = range(first - 1, evaluations, STEP_MASKS[speed])
    return at([i for i in range(evaluations) if i < first or i in regular], evaluations)


def alternating(evaluations: int, per_step: int = 1, shifted: bool = True) -> tuple[int, ...]:
    """Return which evaluations of a run may reuse what the full evaluation right before them kept: every second one.

    Args:
        evaluations: Of a run; any number.
        per_step: Evaluations that the solver makes a step, 1 or 2.
        shifted: For two a step: the first of a step is cheap, the one within it and the very first are full. A solver
            of second order takes the difference of a step's two evaluations, which a kept one within it would spoil.
            False makes the one within the step cheap, to compare.

    Raises:
        PreconditionError: There is no evaluation, or the solver makes more than two a step.
    """
    if evaluations < 1 or per_step not in (1, 2):
        raise PreconditionError(
            "alternating evaluations need a run of 1 or more and a solver that makes 1 or 2 a step, got "
            f"{evaluations} and {per_step}; list the cheap evaluations yourself"
        )
    return tuple(range(2 if per_step == 2 and shifted else 1, evaluations, 2))


def warmed_up(evaluations: int, interval: int, first: int = 3) -> Listed:
    """Return a schedule for extrapolation: full evaluations at first, the next but one, and from there every ``interval``.

    A polynomial needs values that lie apart before its first use; TaylorSeer (arXiv 2503.06923) begins like this.

    Raises:
        PreconditionError: A number is below 1.
    """
    if min(evaluations, interval, first) < 1:
        raise PreconditionError(
            f"evaluations, interval and first must be 1 or more, got {evaluations}, {interval}, {first}"
        )
    regular = range(first + 1, evaluations, interval)
    return at([i for i in range(evaluations) if i < first or i in regular], evaluations)


def centred(evaluations: int, interval: int, center: float, power: float, mode: str = "paper") -> Listed:
    """Return the non-uniform 1:N schedule of DeepCache: full evaluations are denser around ``center``.

    There are ``ceil(evaluations / interval)`` of them, at equal steps of the signed ``1 / power``-th power of the distance
    to the center (equation 7 of arXiv 2312.00858).

    Args:
        evaluations: Of a run.
        interval: N; sets how many evaluations are full.
        center: Evaluation around which they are dense.
        power: Above 1; larger is denser.
        mode: ``paper`` as written there, with the power of a negative distance signed; ``reference`` as the published code
            computes it, with the real part of a complex power, to reproduce its pictures.

    Raises:
        PreconditionError: An argument is out of range, or no schedule of that many full evaluations is found.
    """
    if evaluations < 1 or interval < 1 or not 0 <= center < evaluations or power <= 1 or mode not in _MODES:
        raise PreconditionError(
            f"a centred schedule needs evaluations and interval of 1 or more, 0 <= center < {evaluations}, power above 1 "
            f"and a mode of {', '.join(_MODES)}, got interval {interval}, center {center}, power {power}, mode {mode!r}"
        )
    count = -(-evaluations // interval)
    return at(_MODES[mode](evaluations, count, center, power), evaluations)


def _signed(value: float, power: float) -> float:
    return abs(value) ** power * (1 if value >= 0 else -1)


def _paper(evaluations: int, count: int, center: float, power: float) -> list[int]:
    low, high = _signed(-center, 1 / power), _signed(evaluations - center, 1 / power)
    grid = [low + (high - low) * i / count for i in range(count)]
    places = sorted({min(max(int(_signed(v, power) + center), 0), evaluations - 1) for v in grid} | {0})
    while len(places) < count:  # two points of the grid fell on one evaluation: halve the widest gap
        ends = [*places, evaluations]
        gaps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        widest = gaps.index(max(gaps))
        if gaps[widest] < 2:
            break
        places = sorted({*places, ends[widest] + gaps[widest] // 2})
    return places


def _reference(evaluations: int, count: int, center: float, power: float) -> list[int]:
    while power > 1:
        low, high = complex(-center) ** (1 / power), complex(evaluations - center) ** (1 / power)
        grid = [low + (high - low) * i / count for i in range(count + 1)]
        places = sorted({int((v**power).real) for v in grid})
        places = sorted({0, *(int(v + center) for v in places[1:-1])})
        if len(places) == count:
            return places
        power -= 0.02
    raise PreconditionError(
        f"the published search finds no schedule of {count} full evaluations out of {evaluations} around {center}; "
        "use mode='paper'"
    )


def speedup_bound(macs: Mapping[str, float], ran: Sequence[str]) -> float:
    """Return how many times as fast a run can be by its multiply-accumulates: those of full evaluations only over its own.

    Args:
        macs: Of every stage.
        ran: The stages of a run.
    """
    spent = sum(macs[name] for name in ran)
    return macs[REFRESH] * len(ran) / spent if spent else 1.0


_MODES = {"paper": _paper, "reference": _reference}
_KINDS: dict[str, type[Schedule]] = {cls.kind: cls for cls in (Uniform, Listed)}


def decode(data: dict[str, Any]) -> Schedule:
    """Return the schedule that `Schedule.encode` wrote.

    Raises:
        PreconditionError: It is of no known kind, or its values are out of range.
    """
    kind, values = data.get("kind"), {key: value for key, value in data.items() if key != "kind"}
    if kind not in _KINDS:
        raise PreconditionError(f"a schedule of kind {kind!r} is not known; known: {', '.join(_KINDS)}")
    if "names" in values:
        values["names"] = tuple(map(str, values["names"]))
    return _KINDS[kind](**values)
