"""Samples: what the original and the rewritten model draw, side by side in the report, by a factory of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graph.errors import PreconditionError
from ..graph.program import Program
from ..passes.base import Progress
from .factories import call_factory
from .recipe_schema import Factory


@dataclass(frozen=True)
class Sample:
    """What one model drew.

    Attributes:
        file: Name of a PNG file.
        score: How good it is, if that is known.
    """

    file: str
    score: float | None = None


@dataclass(frozen=True)
class Drawn:
    """What every model drew.

    Attributes:
        models: By the label of the model.
        score: What the scores are, such as ``Frechet distance``.
        note: What a reader of the report should know, in sentences.
    """

    models: Mapping[str, Sample]
    score: str = ""
    note: str = ""


# ``draw(program, models, folder, progress)``: `program` is the rewritten one, `models` are called like it, by label;
# pictures go into `folder`.
Draw = Callable[[Program, Mapping[str, Callable[..., Any]], Path, Progress], Drawn]


def draw_samples(
    chosen: Factory, program: Program, models: Mapping[str, Callable[..., Any]], folder: Path, progress: Progress
) -> dict[str, Any]:
    """Draw samples with the factory of a recipe; return `Drawn` as plain data.

    Raises:
        PreconditionError: The factory cannot be found, refuses its options or the model, or does not return what it
            should.
    """
    draw = call_factory("samples", chosen)
    if not callable(draw):
        raise PreconditionError(
            f"samples {chosen.factory} must return draw(program, models, folder, progress), got {type(draw).__name__}"
        )
    drawn = draw(program, models, folder, progress)
    if not isinstance(drawn, Drawn):
        raise PreconditionError(
            f"samples {chosen.factory}: draw must return a graphwright.tools.samples.Drawn, got {type(drawn).__name__}"
        )
    for label, sample in drawn.models.items():
        if Path(sample.file).name != sample.file or not (folder / sample.file).is_file():
            raise PreconditionError(
                f"samples {chosen.factory}: the file of {label!r} must be the name of one in the folder that draw was "
                f"given, got {sample.file!r}"
            )
    return dataclasses.asdict(drawn)
