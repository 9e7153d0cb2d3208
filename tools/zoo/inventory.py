"""What can shrink in the zoo's models, written from their configurations and not from an analysis of their graphs.

`INVENTORY` maps the name of an entry to a function that counts its axes by (kind, size); `Axes` explains the kinds
and the conventions. An analysis that disagrees with a line here has found either its own mistake or one of ours;
each difference deserves an explanation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from . import inventory_diffusers, inventory_odd, inventory_torch, inventory_transformers, inventory_vision
from .inventory_parts import Axes

__all__ = ["INVENTORY", "Axes"]

INVENTORY: dict[str, Callable[[], Counter[tuple[str, int]]]] = {}
for _module in (inventory_torch, inventory_transformers, inventory_vision, inventory_diffusers, inventory_odd):
    if _twice := INVENTORY.keys() & _module.INVENTORY.keys():
        raise ValueError(f"inventories written twice: {sorted(_twice)}")
    INVENTORY.update(_module.INVENTORY)
