"""What can shrink in the zoo's models, written from their configurations and not from an analysis of their graphs.

`INVENTORY` maps the name of an entry to a function that counts its axes by (kind, size); `Axes` explains the kinds
and the conventions. An analysis that disagrees with a line here has found either its own mistake or one of ours;
each difference deserves an explanation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ...graph.depgraph import DepGraph
from . import inventory_diffusers, inventory_odd, inventory_torch, inventory_transformers, inventory_vision
from .inventory_differences import DIFFERENCES, Difference
from .inventory_parts import Axes

__all__ = ["INVENTORY", "Axes", "unexplained"]

INVENTORY: dict[str, Callable[[], Counter[tuple[str, int]]]] = {}
for _module in (inventory_torch, inventory_transformers, inventory_vision, inventory_diffusers, inventory_odd):
    if _twice := INVENTORY.keys() & _module.INVENTORY.keys():
        raise ValueError(f"inventories written twice: {sorted(_twice)}")
    INVENTORY.update(_module.INVENTORY)

_NONE = Difference("")


def unexplained(name: str, graph: DepGraph) -> list[str]:
    """Compare what an analysis offers with the inventory of the entry, if it has one.

    Returns:
        One sentence for each axis too many or too few that `inventory_differences` does not list, and for each that it
        lists and that is not there, or not frozen for the reason that it gives.
    """
    if name not in INVENTORY:
        return []
    want, got = INVENTORY[name](), Counter((g.kind, g.size) for g in graph.groups)
    known = DIFFERENCES.get(name, _NONE)
    out = []
    for what, found, listed in (("missing", want - got, known.missing), ("extra", got - want, known.extra)):
        for axis in sorted(found.keys() | listed.keys()):
            if found[axis] != (expected := listed.get(axis, 0)):
                out.append(f"{found[axis]} {what} of {axis[0]} {axis[1]}, explained are {expected}")
    if known.frozen and all(known.frozen not in f.reason for f in graph.frozen):
        out.append(f"nothing is frozen because '{known.frozen}'")
    return out
