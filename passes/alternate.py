"""Iterative removal: a little goes, the rest is trained, and again."""

from __future__ import annotations

from dataclasses import replace

from .base import Pass
from .remove_channels import RemoveChannels
from .train_weights import TrainWeights

RATIOS = ("ratio", "head_ratio", "head_group_ratio", "head_dim_ratio")
TARGETS = ("macs", "parameters", "latency")


def alternate(removal: RemoveChannels, training: TrainWeights, rounds: int) -> list[Pass]:
    """Return the passes of ``rounds`` removals, each followed by a training, that together remove what ``removal`` does.

    After round ``i`` of ``n`` the fraction ``i / n`` of every ratio is gone, of the widths at the beginning; with a target
    the cost has come down by the fraction ``i / n`` of the way. (`RemoveChannels.steps` does so without training between.)

    Args:
        removal: As if it were done at once.
        training: After each removal; every round trains for as long.
        rounds: At least 1.

    Raises:
        ValueError: ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds!r}")
    done: list[Pass] = []
    for i in range(rounds):
        before, after = i / rounds, (i + 1) / rounds
        shares = {name: _share(getattr(removal, name), before, after) for name in RATIOS}
        own = {pattern: _share(ratio, before, after) for pattern, ratio in removal.ratios.items()}
        targets = {
            name: (1 - (1 - value) * after) / (1 - (1 - value) * before)
            for name in TARGETS
            if (value := getattr(removal, name)) is not None
        }
        # With a target only the proportions of the ratios count.
        done += [replace(removal, **(targets or {**shares, "ratios": own})), training]
    return done


def _share(ratio: float, before: float, after: float) -> float:
    """Return the fraction of what is left that takes the removal from ``before`` to ``after`` of the whole."""
    return 1 - (1 - ratio * after) / (1 - ratio * before)
