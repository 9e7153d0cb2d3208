"""An experiment: a plan whose registers are extrapolated between full evaluations, as TaylorSeer does with layers' outputs.

The programs stay as they are. Only what a reuse is given differs: instead of the value of the last full evaluation, that of
the polynomial through the last ones. So the table tells apart what a cut is worth and what extrapolation is worth.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...graph.plan import Plan
from ...graph.schedules import REFRESH, Listed, at

WARM_UP = 3


def warmed_up(evaluations: int, interval: int) -> Listed:
    """Return TaylorSeer's schedule: three full evaluations, the fifth, and from there every ``interval``."""
    regular = range(WARM_UP + 1, evaluations, interval)
    return at([i for i in range(evaluations) if i < WARM_UP or i in regular], evaluations)


class Extrapolated:
    """A plan for one run, called like the denoiser.

    Args:
        plan: Its schedule is followed.
        order: Of the polynomial, 0 for the last value; with too few full evaluations so far it is lower.
    """

    def __init__(self, plan: Plan, order: int) -> None:
        self._plan, self._order = plan, order
        self._index = 0
        self._kept: list[tuple[int, dict[str, Tensor]]] = []

    def __call__(self, **inputs: Any) -> Any:
        """Evaluate."""
        name = self._plan.schedule.program(self._index)
        stage = self._plan.stage(name)
        registers = {register: self._at(register) for register in stage.reads}
        result, written = self._plan.split(name, stage.program(**inputs, **registers))
        if name == REFRESH:
            self._kept = [*self._kept, (self._index, written)][-(self._order + 1) :]
        self._index += 1
        return result

    def _at(self, register: str) -> Tensor:
        """Return the value that the polynomial has now (Lagrange's form)."""
        value = None
        for place, values in self._kept:
            weight = 1.0
            for other, _ in self._kept:
                if other != place:
                    weight *= (self._index - other) / (place - other)
            term = weight * values[register]
            value = term if value is None else value + term
        assert value is not None  # a schedule begins with a full evaluation
        return value
