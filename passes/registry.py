"""Passes by name. Listing them imports none; third parties add theirs through the entry-point group."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from ..graph.errors import unknown

if TYPE_CHECKING:
    from .base import Pass

ENTRY_POINTS = "graphwright.passes"

BUILTIN = {
    "eliminate-dead-code": "graphwright.passes.eliminate_dead_code:EliminateDeadCode",
    "fold-batch-norm": "graphwright.passes.fold_batch_norm:FoldBatchNorm",
    "insert-feature-cache": "graphwright.passes.insert_feature_cache:InsertFeatureCache",
    "insert-layer-cache": "graphwright.passes.insert_layer_cache:InsertLayerCache",
    "learn-layer-cache": "graphwright.passes.learn_layer_cache:LearnLayerCache",
    "remove-blocks": "graphwright.passes.remove_blocks:RemoveBlocks",
    "remove-channels": "graphwright.passes.remove_channels:RemoveChannels",
    "remove-dropout": "graphwright.passes.remove_dropout:RemoveDropout",
    "train-weights": "graphwright.passes.train_weights:TrainWeights",
}


def names() -> dict[str, str]:
    """Return every known pass name with the path of its class.

    Raises:
        ValueError: Two packages register the same name.
    """
    found = dict(BUILTIN)
    for entry in _foreign():
        if entry.name in found:
            raise ValueError(f"the pass name {entry.name!r} is registered twice: {found[entry.name]} and {entry.value}")
        found[entry.name] = entry.value
    return found


def load(name: str) -> type[Pass]:
    """Import the pass class registered as ``name``.

    Raises:
        ValueError: There is none; names the known ones and the nearest.
    """
    known = names()
    if name not in known:
        raise ValueError(unknown("unknown pass", name, known))
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def _foreign() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))
