"""The architecture zoo: small models with real topologies, for coverage sweeps, and hand-written inventories.

Importing this package imports no model library; `Entry.build` does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from . import (
    diffusers_models,
    odd_cases,
    timm_models,
    torch_cnn,
    torch_models,
    torch_transformers,
    torchvision_models,
    transformers_models,
    transformers_more,
    transformers_vision,
)
from .entry import Case, Entry, seeded_init, tensors

__all__ = ["ZOO", "Case", "Entry", "entries", "missing", "seeded_init", "tensors"]

ZOO: dict[str, Entry] = {}
for _module in (
    torch_models,
    torch_cnn,
    torch_transformers,
    transformers_models,
    transformers_more,
    transformers_vision,
    diffusers_models,
    timm_models,
    torchvision_models,
    odd_cases,
):
    for _entry in _module.ENTRIES:
        if _entry.name in ZOO:
            raise ValueError(f"the zoo has two entries named {_entry.name}")
        ZOO[_entry.name] = _entry


def entries(families: Iterable[str] | None = None) -> list[Entry]:
    """Return the entries of the given families, or all of them, in a fixed order."""
    wanted = None if families is None else set(families)
    return [entry for entry in ZOO.values() if wanted is None or entry.family in wanted]


def missing(entry: Entry) -> list[str]:
    """Return the modules an entry needs that cannot be found here; the entry is skipped with that reason."""
    return [name for name in entry.requires if importlib.util.find_spec(name) is None]
