"""Calibration of a recipe: the loss and the batches that gradient criteria need."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..graph.errors import PreconditionError
from ..passes.base import Context
from .recipe_schema import Calibration

Progress = Callable[[str, int, int], None]

BUILTIN = {"digits-ddpm": "graphwright.tools.calibration:digits"}


def context_of(calibration: Calibration | None, progress: Progress | None = None) -> Context:
    """Return the context of passes, with the calibration loss and batches if there are any.

    Raises:
        PreconditionError: The factory cannot be found, does not take its options, or returns something else than
            ``(loss, batches)``.
    """
    if calibration is None:
        return Context(progress=progress)
    factory = find_factory(BUILTIN.get(calibration.factory, calibration.factory), "calibration")
    try:
        made = factory(**calibration.options)
    except (TypeError, ValueError) as err:
        raise PreconditionError(f"calibration {calibration.factory} refuses its options: {err}") from err
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise PreconditionError(
            f"calibration {calibration.factory} must return (loss, batches) with loss(program, batch), or "
            f"(loss, batches, split), got {type(made).__name__}"
        )
    loss, batches, split = made if len(made) == 3 else (*made, None)
    return Context(loss=loss, batches=list(batches), split=split, progress=progress)


def digits(**options: Any) -> tuple[Any, ...]:
    """Return the calibration of ``builtin:digits-ddpm``: noisy digits, and how to take a batch of them apart."""
    from .digits import NoisyBatch, calibration

    def split(batch: NoisyBatch) -> list[NoisyBatch]:
        return [NoisyBatch(*(part[i : i + 1] for part in batch)) for i in range(len(batch.sample))]

    return (*calibration(**options), split)


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Find modules in the working directory inside the block, as ``python -m`` does and a command does not."""
    here = os.getcwd()
    known = here in sys.path or "" in sys.path
    if not known:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if not known and here in sys.path:
            sys.path.remove(here)


def find_factory(path: str, what: str) -> Callable[..., Any]:
    """Import ``package.module:name``.

    Raises:
        PreconditionError: There is no such module or name.
    """
    module, sign, name = path.partition(":")
    if not sign or not module or not name:
        known = ", ".join(BUILTIN)
        raise PreconditionError(f"{what} must be package.module:factory or one of {known}, got {path!r}")
    try:
        with working_directory_importable():
            found = getattr(import_module(module), name)
    except ModuleNotFoundError as err:
        raise PreconditionError(f"{what} {path}: there is no module {err.name!r} to import") from err
    except AttributeError:
        raise PreconditionError(f"{what} {path}: the module {module} has no {name!r}") from None
    if not callable(found):
        raise PreconditionError(f"{what} {path} must be a callable, got {type(found).__name__}")
    return found
