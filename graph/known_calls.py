"""Calls that came before: arranging and checking inputs takes longer than a small network, and calls are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from operator import is_
from typing import Any

from torch import Tensor
from torch.jit._trace import is_tracing

# Where each leaf comes from when every input is one: a place among those given, or a default.
Places = list[int | tuple[Any]]


class KnownCalls:
    """What was found out about how a module is called, so that inputs of a form that came before are not looked at again.

    Args:
        of: What inputs are checked against.
    """

    def __init__(self, of: tuple[Any, ...]) -> None:
        self._of = of
        self._forms: set[tuple[Any, ...]] = set()
        self._places: dict[tuple[Any, ...], Places | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownCalls, (self._of,)  # a copy has other objects, of which nothing is known

    def stands_for(self, of: tuple[Any, ...]) -> bool:
        """Whether nothing that inputs are checked against was replaced."""
        return all(map(is_, self._of, of))

    def look(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], places: Callable[[int, Iterable[str]], Places | None]
    ) -> tuple[list[Any], tuple[Any, ...] | None]:
        """Return the leaves of a call and their form, which is None if there is anything to look at closely.

        A form has the shape and dtype of every tensor, and any other value by its identity: those that are remembered are
        constants of the capture, which stay alive.
        """
        key = (len(args), *kwargs)
        if key not in self._places:
            self._places[key] = places(len(args), kwargs)
        found = self._places[key]
        if found is None:
            return [], None
        given = (*args, *kwargs.values())
        leaves = [given[place] if isinstance(place, int) else place[0] for place in found]
        return leaves, (key, *((v.shape, v.dtype) if isinstance(v, Tensor) else id(v) for v in leaves))

    def holds(self, form: tuple[Any, ...] | None) -> bool:
        """Whether inputs of this form are known to fit."""
        try:
            return form in self._forms
        except TypeError:  # sizes that a tracer left open cannot be looked up
            return False

    def remember(self, form: tuple[Any, ...]) -> None:
        """Note that inputs of this form fit; their values that are no tensors have to be the constants of `of`."""
        if not is_tracing():  # by torch.jit, where sizes are tensors, of which none comes again
            with suppress(TypeError):
                self._forms.add(form)
