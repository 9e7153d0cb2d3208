"""Names of coupling groups: the layer that first produces the axis, the kind, and a number where these are shared.

A group must keep its name when others of the same layer reach width 1 and are groups no longer. So a removal notes, for
groups that differ by the number only, which indices of the producing tensor are whose; the next analysis looks there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class GroupName:
    """A name, and where its group is.

    Attributes:
        name: The group's name.
        tensor: Name of the tensor that produces the axis.
        dim: Its dimension.
        index: For each index of that dimension, which index of the group it belongs to; -1 where to none.
    """

    name: str
    tensor: str
    dim: int
    index: tuple[int, ...]

    def cut(self, kept: Sequence[int]) -> GroupName:
        """Return the same after a removal of which ``kept`` indices of the dimension stay."""
        return replace(self, index=tuple(self.index[i] for i in kept))

    def is_at(self, tensor: str, dim: int, positions: np.ndarray) -> bool:
        """Whether what is at ``positions`` of a tensor's dimension, ``[size, k]``, is the named group or what is left of it."""
        if (self.tensor, self.dim) != (tensor, dim) or positions.max() >= len(self.index):
            return False
        rows = np.asarray(self.index)[positions]
        first = rows[:, :1]
        return bool((rows == first).all() and (first >= 0).all()) and len(np.unique(first)) == len(first)


def named(name: str, tensor: str, dim: int, size: int, positions: np.ndarray) -> GroupName:
    """Note a name for what is at ``positions`` of a tensor's dimension of ``size`` indices."""
    index = np.full(size, -1)
    for row, at in enumerate(positions):
        index[at] = row
    return GroupName(name, tensor, dim, tuple(index.tolist()))


def choose(
    bases: Sequence[str], places: Sequence[tuple[str, int, np.ndarray]], known: Sequence[GroupName]
) -> list[str]:
    """Return a name for every group: the one it had, else its base, with a number if that is taken.

    Args:
        bases: Layer and kind.
        places: Tensor, dimension and positions of each group.
        known: What removals noted.
    """
    free, taken = list(known), {k.name for k in known}
    count: Counter[str] = Counter()
    out = []
    for base, place in zip(bases, places, strict=True):
        before = next((k for k in free if base in (k.name, k.name.rpartition(".")[0]) and k.is_at(*place)), None)
        if before is not None:
            free.remove(before)
            out.append(before.name)
            continue
        while True:
            count[base] += 1
            name = base if count[base] == 1 else f"{base}.{count[base]}"
            if name not in taken:
                break
        taken.add(name)
        out.append(name)
    return out


def cut_all(names: Sequence[GroupName], cuts: Mapping[str, Mapping[int, Sequence[int]]]) -> tuple[GroupName, ...]:
    """Return the names after a removal, given the kept indices by tensor and dimension."""
    found = ((n, cuts.get(n.tensor, {}).get(n.dim)) for n in names)
    return tuple(n if kept is None else n.cut(kept) for n, kept in found)


__all__ = ["GroupName", "choose", "cut_all", "named"]
