"""The demo's samples: digits drawn by the original and by the rewritten model, and how far they are from real ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..graph.errors import PreconditionError
from ..graph.program import Program
from .recipe_schema import Samples

Progress = Callable[[str, int, int], None]


def draw(
    models: Mapping[str, Callable[..., Any]], options: Samples, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Draw the same pictures with each model and judge them.

    Args:
        models: By label, called as ``model(sample, timestep, return_dict=False)[0]``.
        options: How many, in how many steps, from which noise.
        folder: Gets a PNG of each, a grid of the first pictures.
        progress: Called after every denoising step.

    Returns:
        By label, ``frechet`` (squared Frechet distance to the real digits, in features of the shipped classifier) and
        ``file``; ``real_frechet`` is the distance between as many real digits and all of them: what a perfect model
        would have.
    """
    from .digits import denoiser, digits_frechet, image_grid, sample_digits

    results: dict[str, Any] = {}
    for label, model in models.items():
        denoise = _counted(denoiser(model), f"draw digits ({label})", _calls(options), progress)
        images = sample_digits(denoise, count=options.count, steps=options.steps, seed=options.seed)
        file = re.sub(r"\W+", "-", label).lower() + ".png"
        (folder / file).write_bytes(image_grid(images[: options.shown], columns=16, scale=5))
        results[label] = {"frechet": digits_frechet(images), "file": file}
    return {
        "models": results,
        "real_frechet": digits_frechet(_real(options.count, options.seed)),
        "count": options.count,
        "steps": options.steps,
        "seed": options.seed,
    }


def require_digits(program: Program) -> None:
    """Raise `PreconditionError` unless ``program`` takes and returns what a digit denoiser does."""
    shapes = [spec.shape[1:] for spec in program.inputs if spec.is_tensor]
    if shapes != [(1, 8, 8), ()]:
        raise PreconditionError(
            "samples are drawn with a denoiser of 8x8 digits such as builtin:digits-ddpm; "
            f"{program.name} takes other inputs: leave `samples` out of the recipe"
        )


def _calls(options: Samples) -> int:
    from .digits import MAX_BATCH

    return options.steps * -(-options.count // MAX_BATCH)


def _counted(denoise: Callable[[Tensor, Tensor], Any], what: str, total: int, progress: Progress) -> Any:
    done = 0

    def counted(sample: Tensor, timestep: Tensor) -> Any:
        nonlocal done
        noise = denoise(sample, timestep)
        done += 1
        progress(what, done, total)
        return noise

    return counted


def _real(count: int, seed: int) -> Tensor:
    """Return ``count`` real digits, drawn with replacement where there are not so many."""
    import torch

    from ..frontends.builtin import digits_images

    images = torch.cat(digits_images())
    generator = torch.Generator().manual_seed(seed)
    if count <= len(images):
        return images[torch.randperm(len(images), generator=generator)[:count]]
    return images[torch.randint(len(images), (count,), generator=generator)]
