"""Import of the router files that were published with Learning-to-Cache.

Both forms map names ``<i>.prob`` to logits, one vector an evaluation, attention and feed-forward of each block in turn:

- ``dit``: ``{"routers": {"0.prob": [56], ...}, "opt": ..., "args": ...}``. ``i`` counts the respaced times from the clean
  end, so evaluation ``e`` of ``T`` has ``i = T - 1 - e``. Odd ``i`` are full evaluations, even ones cheap.
- ``uvit``: the bare mapping, for a solver with two evaluations a step. ``i`` counts its steps; the first evaluation of
  every step but the first is cheap, so evaluation ``2 * i`` has vector ``i``.

Vectors of full evaluations are in the files too. They were never trained and hold random numbers; they are not read.

Paper: Learning-to-Cache (arXiv 2406.01733).
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import ArtifactError, PreconditionError
from ..graph.schedules import alternating
from .insert_layer_cache import KINDS
from .layer_router import LayerRouter

# The paper's thresholds.
THRESHOLDS = {"dit": 0.1, "uvit": 0.9}
_NAME = re.compile(r"(0|[1-9]\d*)\.prob")
# What of the stored arguments says how a router was trained.
_ARGUMENTS = {
    "model": "model",
    "image_size": "image_size",
    "l1": "lam",
    "lr": "lr",
    "epochs": "epochs",
    "global_batch_size": "batch",
    "global_seed": "seed",
}


def import_router(
    source: Mapping[str, Any] | str | os.PathLike[str],
    evaluations: int | None = None,
    kind: str | None = None,
    *,
    kinds: Sequence[str] = (),
    threshold: float | None = None,
) -> LayerRouter:
    """Return a published router.

    Args:
        source: A file that ``torch.save`` wrote, or what is in it. It is read without running code from it.
        evaluations: Of a run, to be checked; None for as many as the file has vectors.
        kind: ``dit`` or ``uvit``; None to tell by the form.
        kinds: Of the branches in graph order; by default attention and feed-forward in turn.
        threshold: Of the router; by default the paper's, 0.1 for ``dit`` and 0.9 for ``uvit``.

    Raises:
        ArtifactError: The file is missing, or holds something else than a router.
        PreconditionError: It is for another number of evaluations or branches, or the kind is not known.
    """
    name = "the mapping" if isinstance(source, Mapping) else str(source)
    data = source if isinstance(source, Mapping) else _read(Path(source))
    kind = kind or ("dit" if "routers" in data else "uvit")
    if kind not in THRESHOLDS:
        raise PreconditionError(f"there are no published routers of kind {kind!r}; known: {', '.join(THRESHOLDS)}")
    vectors = _vectors(name, data.get("routers", data))
    total = len(vectors)
    if evaluations not in (None, total):
        raise PreconditionError(
            f"{name} is for runs of {total} evaluations, got {evaluations}; set the sampler to {total}"
        )
    places = _places(kind, total)
    if not places:
        raise ArtifactError(f"{name} has no cheap evaluation: it holds {total} vectors")
    logits = torch.stack([vectors[i] for i in places.values()]).float()
    branches = logits.shape[1]
    kinds = tuple(kinds) or tuple(KINDS[i % 2] for i in range(branches))
    if len(kinds) != branches:
        raise PreconditionError(f"{name} is for {branches} branches, and kinds names {len(kinds)}; name as many")
    settings = {"source": f"published {kind} router", **_arguments(data.get("args"))}
    return LayerRouter(total, tuple(places), kinds, logits, threshold or THRESHOLDS[kind], settings)


def _places(kind: str, total: int) -> dict[int, int]:
    """Return the index in the file by cheap evaluation, ascending."""
    if kind == "uvit":
        return {e: e // 2 for e in alternating(total, per_step=2)}
    # Even indices are cheap, except one at which a run would begin, of an odd number of evaluations.
    return {total - 1 - i: i for i in range(total - 2, -1, -1) if i % 2 == 0}


def _vectors(name: str, found: Any) -> list[Tensor]:
    """Return the logits in the order of their index."""
    if not isinstance(found, Mapping) or not found:
        raise ArtifactError(f"{name} holds no router: expected a mapping of names such as '0.prob' to logits")
    vectors: dict[int, Tensor] = {}
    for key, value in found.items():
        match = _NAME.fullmatch(str(key))
        if match is None or not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point():
            raise ArtifactError(
                f"{name} holds no router: '{key}' is not a vector of logits with a name such as '0.prob'"
            )
        vectors[int(match[1])] = value.detach().cpu()
    if sorted(vectors) != list(range(len(vectors))):
        raise ArtifactError(f"{name} is no whole router: it has {len(vectors)} vectors, and not those from 0 on")
    if len({v.shape for v in vectors.values()}) > 1:
        raise ArtifactError(f"{name} is no router: its vectors have different lengths")
    return [vectors[i] for i in range(len(vectors))]


def _arguments(stored: Any) -> dict[str, Any]:
    """Return what the arguments of the training say about it; paths and the like are left out."""
    values = vars(stored) if isinstance(stored, argparse.Namespace) else {}
    kept = {new: values[old] for old, new in _ARGUMENTS.items() if old in values}
    return {key: value for key, value in kept.items() if isinstance(value, (str, int, float))}


def _read(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ArtifactError(f"there is no file {file}")
    try:
        # A Namespace, in which the arguments are stored, is nothing but its attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as err:
        raise ArtifactError(
            f"{file} is damaged, or holds more than tensors and plain data, which is not run: {err}"
        ) from err
    if not isinstance(data, Mapping):
        raise ArtifactError(f"{file} holds no router: expected a mapping, got {type(data).__name__}")
    return data
