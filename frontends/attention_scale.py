"""Keeping the scale of attention scores when heads become narrower.

Removal keeps the original scale, ``1 / sqrt(head width)``. A module that stores it as an attribute needs nothing; one
whose forward derives it from the width that is left needs weights that make up for the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from ..graph.axes import Axis, find, leaves
from ..graph.depgraph import DepGraph
from ..graph.groups import Member
from ..graph.resize import RemovalRecord
from .multihead import ResizedMultiheadAttention
from .sizes import HEAD, HEAD_DIM, SizeChanges, module_paths
from .torch_layers import TRANSPOSED, layer_literals

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class ScaleKeeper:
    """Makes every attention in ``work`` score as it did.

    Args:
        work: The copy with the program's tensors; changed.
        graph: Analysis of the program before the removal.
        sizes: Sizes inside each module before and after.
        removal: What was removed.

    Attributes:
        classes: Module path to the class it was given and its scale.
        scaled: Parameter name to the factor that some of its rows were multiplied by.
        paths: Modules inside which queries, keys and scores differ by a factor from the program's, and rightly.
    """

    def __init__(self, work: nn.Module, graph: DepGraph, sizes: SizeChanges, removal: RemovalRecord) -> None:
        self.graph = graph
        self.sizes = sizes
        self.removal = removal
        self.classes: dict[str, tuple[str, float]] = {}
        self.scaled: dict[str, float] = {}
        self.paths: set[str] = set()
        self._modules = dict(work.named_modules(remove_duplicate=False))
        self._literals = layer_literals(graph.program)

    def keep(self) -> None:
        """Keep the scale of the scores where forward derives it from the head width that is left."""
        seen: set[str] = set()
        for node in self.graph.program.nodes:
            path = (module_paths(node) or [""])[-1]
            module = self._modules.get(path)
            if isinstance(module, nn.MultiheadAttention):
                if path not in seen and self._changed_tensors(path):
                    seen.add(path)
                    self._adopt(path, module)
            elif node.target is _ATTENTION and node.kwargs.get("scale") is None and path not in seen:
                seen.add(path)
                self._absorb(path, self.graph.analysis.of(node.args[0])[-1])

    def narrowed(self) -> list[str]:
        """Return the modules whose own operators carry a width of queries and keys that changed, outer ones first."""
        return sorted(self._narrowed, key=lambda path: path.count(".") + bool(path))

    def absorb_at(self, path: str) -> Callable[[], None] | None:
        """Make up for the scale of the attention at ``path``, whatever form its forward has.

        Returns:
            What undoes it; None where no width of queries and keys changed there, or it was made up for already.
        """
        width = self._narrowed.get(path)
        before = dict(self.scaled)
        if width is None:
            return None
        saved = {name: self._parameter(name).detach().clone() for name in self._carriers(path, width)}
        if set(saved) & set(before):
            return None
        self._absorb(path, width)

        def undo() -> None:
            for name, tensor in saved.items():
                with torch.no_grad():
                    self._parameter(name).copy_(tensor)
            for name in set(self.scaled) - set(before):
                del self.scaled[name]
            self.paths.discard(path)

        return undo if set(self.scaled) != set(before) else None

    @cached_property
    def _narrowed(self) -> dict[str, Axis]:
        """The width of queries and keys of every module whose own operators carry one that changed."""
        widths = {find(axis) for axis, role in self.graph.analysis.attention_roles() if role == HEAD_DIM}
        widths = {axis for axis in widths if type(axis.size) is int and self.sizes.new_size(axis) != axis.size}
        out: dict[str, Axis] = {}
        for node in self.graph.program.nodes:
            paths = module_paths(node)
            for axis in self.graph.analysis.of(node) if paths else ():
                if isinstance(axis, Axis) and find(axis) in widths:
                    out.setdefault(paths[-1], find(axis))
        return out

    def _parameter(self, name: str) -> Tensor:
        owner, _, short = name.rpartition(".")
        return getattr(self._modules[owner], short)

    def _changed_tensors(self, path: str) -> bool:
        return any(name.rpartition(".")[0] in (path, f"{path}.out_proj") for name in self.removal.tensors)

    def _adopt(self, path: str, module: nn.MultiheadAttention) -> None:
        scale = module.scale if isinstance(module, ResizedMultiheadAttention) else module.head_dim**-0.5
        changes = self.sizes.inside(path)
        module.embed_dim = int(module.out_proj.weight.shape[0])
        for name, role in (("num_heads", HEAD), ("head_dim", HEAD_DIM)):
            new = next((c.new for c in changes if c.role == role and c.old == getattr(module, name)), None)
            if new is not None:
                setattr(module, name, new)
        ResizedMultiheadAttention.adopt(module, scale)
        self.classes[path] = (ResizedMultiheadAttention.__name__, scale)

    def _absorb(self, path: str, width: Axis) -> None:
        """Multiply the queries' and keys' weights by what the scale loses: ``sqrt(new width / old width)`` together.

        Half of it goes to each side, since query and key may come from one fused projection. With norms on queries and
        keys it goes to the norms' weights, which undo any factor before them. Where values share the axis they are scaled
        too, and the layer that takes them in gets the inverse.
        """
        old, new = int(width.size), self.sizes.new_size(width)
        if old == new:
            return
        carriers = self._carriers(path, width)
        norms = {n: m for n, m in carriers.items() if not self._is_projection(n)}
        chosen = norms or carriers
        factor = math.sqrt(new / old)
        self.paths.add(path)
        owners = {name.rpartition(".")[0] for name in chosen}
        for name, members in chosen.items():
            self._scale(name, members, math.sqrt(factor) if len(owners) > 1 or not norms else factor)

    def _carriers(self, path: str, width: Axis) -> dict[str, list[Member]]:
        """Return the parameters below ``path`` with an index that belongs to ``width``."""
        wanted = set(leaves(width))
        out: dict[str, list[Member]] = {}
        for group in self.graph.groups:
            if group.axis in wanted:
                for member in group.parameters:
                    if member.name.startswith(f"{path}.") or not path:
                        out.setdefault(member.name, []).append(member)
        return out

    def _is_projection(self, name: str) -> bool:
        owner = self._modules[name.rpartition(".")[0]]
        return any(p.dim() > 1 for p in owner.parameters(recurse=False))

    def _takes_in(self, name: str, dim: int) -> bool:
        """Whether dimension ``dim`` of parameter ``name`` is that of its layer's input."""
        path = name.rpartition(".")[0]
        module = self._modules[path]
        if isinstance(module, nn.Embedding) or list(module.children()) or self._parameter(name).dim() < 2:
            return False
        transposed = self._literals.get(path, {}).get(TRANSPOSED) or getattr(module, "transposed", False)
        return dim == (0 if transposed else 1)

    def _scale(self, name: str, members: list[Member], factor: float) -> None:
        """Multiply the indices of the work copy's parameter ``name`` that belong to ``members`` by ``factor``."""
        tensor = self._parameter(name)
        for dim in {m.dim for m in members}:
            cut = self.removal.tensors.get(name, {}).get(dim)
            scaled = torch.zeros(cut.of if cut else tensor.shape[dim], dtype=torch.bool)
            for member in members:
                if member.dim == dim:
                    scaled[torch.as_tensor(member.positions().reshape(-1))] = True
            rows = scaled if cut is None else scaled[list(cut.kept)]
            shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
            applied = 1 / factor if self._takes_in(name, dim) else factor
            factors = torch.where(rows, applied, 1.0).to(tensor.dtype).view(shape)
            with torch.no_grad():
                tensor.mul_(factors.to(tensor.device))
            self.scaled[name] = applied
