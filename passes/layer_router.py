"""`LayerRouter`: which residual branches are computed at which evaluation of a sampling run, as learned numbers.

    router = LayerRouter.load("router.safetensors")
    plan = Pipeline([router.layer_cache(threshold=0.1)])(program).plan

One logit a branch and cheap evaluation: the branch is computed where ``sigmoid(logit) > threshold``, and taken from the
last full evaluation elsewhere. (Algorithm 2 of the paper prints the comparison the other way round; its text and its
code agree on this one.)

Paper: Learning-to-Cache (arXiv 2406.01733).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph.errors import ArtifactError, PreconditionError
from ..graph.files import staged_file
from ..graph.program import Program
from .insert_layer_cache import InsertLayerCache, require_kinds
from .sampling_runs import require_cheap

FORMAT = "graphwright layer router"
FORMAT_VERSION = 1
_KEY = "graphwright"


@dataclass(frozen=True, eq=False)
class LayerRouter:
    """Logits of a run of one length.

    Attributes:
        evaluations: Of the run.
        cheap: Numbers of the evaluations that may reuse, ascending; all others are full.
        kinds: Of the branches in graph order, ``attention`` or ``mlp``.
        logits: ``[cheap evaluations, branches]``.
        threshold: Taken where none is given. The paper takes 0.1 for DiT and 0.9 for U-ViT.
        settings: What it was trained with, plain data.

    Raises:
        PreconditionError: These do not fit together.
    """

    evaluations: int
    cheap: tuple[int, ...]
    kinds: tuple[str, ...]
    logits: Tensor
    threshold: float = 0.1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cheap != require_cheap(self.evaluations, self.cheap):
            raise PreconditionError(f"the cheap evaluations of a router must ascend, got {list(self.cheap)}")
        want = [len(self.cheap), len(self.kinds)]
        if list(self.logits.shape) != want or not self.logits.is_floating_point():
            raise PreconditionError(
                f"a router of {want[0]} cheap evaluations and {want[1]} branches needs logits of that shape, got "
                f"{list(self.logits.shape)} of {self.logits.dtype}"
            )
        if bool(torch.isnan(self.logits).any()):
            raise PreconditionError("a router's logits must be numbers, and one of them is not")
        _require_threshold(self.threshold)

    def computed(self, threshold: float | None = None) -> Tensor:
        """Return which branches are computed, ``[cheap evaluations, branches]``, bool."""
        threshold = self.threshold if threshold is None else threshold
        _require_threshold(threshold)
        return self.logits.double().sigmoid() > threshold

    def reuse(self, threshold: float | None = None) -> tuple[tuple[int, ...], ...]:
        """Return, for every evaluation, the numbers of the branches to take: what `InsertLayerCache` is given.

        A cheap evaluation that takes none is a full one, and keeps its branches.

        Raises:
            PreconditionError: The threshold is not between 0 and 1.
        """
        rows = [tuple(torch.nonzero(~row).flatten().tolist()) for row in self.computed(threshold)]
        taken = dict(zip(self.cheap, rows, strict=True))
        return tuple(taken.get(i, ()) for i in range(self.evaluations))

    def removed(self, threshold: float | None = None) -> dict[str, int]:
        """Return how many branches are taken in a run, by kind."""
        counts = (~self.computed(threshold)).sum(0).tolist()
        return {
            kind: sum(n for k, n in zip(self.kinds, counts, strict=True) if k == kind)
            for kind in dict.fromkeys(self.kinds)
        }

    def patterns(self, threshold: float | None = None) -> tuple[tuple[int, ...], ...]:
        """Return the distinct sets of branches that cheap evaluations take, that of none among them, in order of use."""
        reuse = self.reuse(threshold)
        return tuple(dict.fromkeys(reuse[i] for i in self.cheap))

    def layer_cache(self, threshold: float | None = None, timestep: str = "timestep") -> InsertLayerCache:
        """Return the pass that makes a plan of a program; it refuses a model with other branches."""
        return InsertLayerCache(self.reuse(threshold), expected=self.kinds, timestep=timestep)

    def check(self, program: Program, evaluations: int | None = None) -> None:
        """Raise `PreconditionError` unless it is for this program, and for runs of this length."""
        require_kinds("the router", self.kinds, program)
        if evaluations not in (None, self.evaluations):
            raise PreconditionError(
                f"the router is for runs of {self.evaluations} evaluations, got {evaluations}; set the sampler to "
                f"{self.evaluations}, or train a router for {evaluations}"
            )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            OSError: The directory does not exist or cannot be written.
        """
        about = {
            "evaluations": self.evaluations,
            "cheap": list(self.cheap),
            "kinds": list(self.kinds),
            "threshold": self.threshold,
            "settings": dict(self.settings),
        }
        write_tensors(file, FORMAT, about, {"logits": self.logits})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> LayerRouter:
        """Read what `save` wrote.

        Raises:
            ArtifactError: The file is missing, damaged, of something else, or newer.
        """
        about, tensors = read_tensors(file, FORMAT)
        try:
            return cls(
                about["evaluations"],
                tuple(about["cheap"]),
                tuple(about["kinds"]),
                tensors["logits"],
                about["threshold"],
                about["settings"],
            )
        except (KeyError, TypeError, PreconditionError) as err:
            raise ArtifactError(f"{file} is damaged: {err}") from err


def write_tensors(
    file: str | os.PathLike[str], kind: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and plain data as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    head = json.dumps({"format": kind, "format_version": FORMAT_VERSION, **about}, allow_nan=False)
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with staged_file(file) as stage:
        save_file(plain, stage, metadata={_KEY: head})


def read_tensors(file: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return plain data and tensors of a file that `write_tensors` wrote.

    Raises:
        ArtifactError: The file is missing, damaged, of something else, or newer.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file():
        raise ArtifactError(f"there is no file {file}")
    try:
        with safe_open(file, "pt") as handle:
            head = (handle.metadata() or {}).get(_KEY)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        about = json.loads(head) if head is not None else {}
    except (SafetensorError, ValueError) as err:
        raise ArtifactError(f"{file} is damaged or no safetensors file: {err}") from err
    if about.get("format") != kind:
        raise ArtifactError(f"{file} is no {kind.removeprefix('graphwright ')} that graphwright wrote")
    if about["format_version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {about['format_version']}, this graphwright reads up to {FORMAT_VERSION}; upgrade "
            "graphwright"
        )
    return about, tensors


def _require_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise PreconditionError(f"a threshold lies between 0 (compute more) and 1 (reuse more), got {threshold}")


__all__ = ["LayerRouter", "read_tensors", "write_tensors"]
