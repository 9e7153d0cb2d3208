"""Resize: the only way a tensor shrinks.

`resize` takes the indices that stay in each coupling group, makes new parameters and buffers, lets every operator's
rule rewrite its literals, re-derives every recorded shape on fake tensors, and returns the removal record.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Node

from .axes import Axis, factors, find, leaves
from .depgraph import DepGraph, check_keep, depgraph
from .errors import PreconditionError, where
from .groups import names_after
from .program import Program, get_tensor, set_tensor, tensor_identity
from .rules import Resizer, rule_for
from .rules.base import is_tensor
from .verify import fake_mode, fake_tensor, verify


@dataclass(frozen=True)
class TensorCut:
    """What stays of one dimension of one tensor: ``kept`` indices of the ``of`` it had."""

    kept: tuple[int, ...]
    of: int

    @cached_property
    def index(self) -> Tensor:
        """``kept`` as a tensor, int64 on the CPU."""
        return torch.tensor(self.kept, dtype=torch.int64)

    def then(self, later: TensorCut, what: str) -> TensorCut:
        """Return this cut followed by ``later``, in terms of the original indices; ``what`` names it in the error."""
        if later.of != len(self.kept):
            raise PreconditionError(
                f"the first removal left {len(self.kept)} indices of {what}, the second was made for {later.of}; "
                "join records of removals that followed each other on one program"
            )
        return TensorCut(tuple(self.kept[i] for i in later.kept), self.of)


@dataclass(frozen=True)
class RemovalRecord:
    """Which indices stayed, by group and by tensor.

    Attributes:
        groups: Kept indices and old size by group name.
        tensors: Tensor name to dimension to cut; every name of a tied tensor is listed.
    """

    groups: Mapping[str, TensorCut] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[int, TensorCut]] = field(default_factory=dict)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Cut one tensor of a checkpoint (or of optimiser state of the same shape) the way this record says.

        Raises:
            PreconditionError: The tensor does not have the size the record was made for.
        """
        return cut_tensor(name, tensor, self.tensors.get(name, {}))

    def then(self, later: RemovalRecord) -> RemovalRecord:
        """Return the record of this removal followed by ``later``, in terms of the original indices.

        Raises:
            PreconditionError: ``later`` is not of the program that this removal left.
        """
        tensors: dict[str, dict[int, TensorCut]] = {n: dict(d) for n, d in self.tensors.items()}
        for name, dims in later.tensors.items():
            for dim, cut in dims.items():
                first = tensors.setdefault(name, {}).get(dim)
                tensors[name][dim] = cut if first is None else first.then(cut, f"dimension {dim} of '{name}'")
        groups = dict(self.groups)
        for name, cut in later.groups.items():
            first = groups.get(name)
            groups[name] = cut if first is None else first.then(cut, f"group '{name}'")
        return RemovalRecord(groups, tensors)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; kept indices as ``[start, stop]`` runs."""
        return {
            "groups": {n: {"kept": _runs(c.kept), "of": c.of} for n, c in self.groups.items()},
            "tensors": {
                n: {str(d): {"kept": _runs(c.kept), "of": c.of} for d, c in dims.items()}
                for n, dims in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RemovalRecord:
        """Read what `to_json` wrote."""
        groups = {n: TensorCut(_unrun(c["kept"]), c["of"]) for n, c in data["groups"].items()}
        tensors = {
            n: {int(d): TensorCut(_unrun(c["kept"]), c["of"]) for d, c in dims.items()}
            for n, dims in data["tensors"].items()
        }
        return cls(groups, tensors)


def _runs(kept: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i in kept:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([int(i), int(i) + 1])
    return runs


def _unrun(runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(i for start, stop in runs for i in range(start, stop))


def cut_tensor(name: str, tensor: Tensor, dims: Mapping[int, TensorCut]) -> Tensor:
    """Return ``tensor`` with only the kept indices, always in memory of its own; a parameter stays one."""
    for dim, cut in dims.items():
        if tensor.shape[dim] != cut.of:
            raise PreconditionError(
                f"'{name}' has size {tensor.shape[dim]} in dimension {dim}, the record was made for {cut.of}; "
                "use the checkpoint the removal was planned on"
            )
    if not dims:
        return tensor
    out = tensor.detach()
    if {0, 1} <= dims.keys() and out.dim() > 2 and out.is_contiguous():
        # Both at once, so that there is no copy that only one of them has cut.
        index = (dims[0].index[:, None] * dims[1].of + dims[1].index).flatten().to(out.device)
        kept = len(dims[0].kept), len(dims[1].kept)
        out = out.flatten(0, 1).index_select(0, index).unflatten(0, kept)
        dims = {d: cut for d, cut in dims.items() if d > 1}
    for dim, cut in dims.items():
        out = out.index_select(dim, cut.index.to(out.device))
    return nn.Parameter(out, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else out


def resize(program: Program, keep: Mapping[str, Any], graph: DepGraph | None = None) -> RemovalRecord:
    """Remove, in place, all indices of the named coupling groups but those to keep.

    The program's tensors are replaced, never written into. If anything is inconsistent the program is as it was.

    Args:
        program: What to shrink.
        keep: Group name to the sorted indices that stay, or to a truth value for every index.
        graph: The program's `depgraph`, if it was made already.

    Returns:
        What stayed, by group and by tensor; replayable on the module, on checkpoints, on optimiser state.

    Raises:
        PreconditionError: A group or an index does not exist, a group norm would not divide its channels, or ``graph``
            was made before the program was last rewritten.
        VerificationError: The rewritten graph is inconsistent (a bug of an operator's rule).
    """
    graph = graph or depgraph(program)
    if graph.program is not program:
        raise PreconditionError("the coupling analysis is of another program; call depgraph on this one")
    smaller, record = resized(graph, keep)
    program.graph_module = smaller.graph_module
    program.group_names = smaller.group_names
    program.version += 1
    return record


def resized(graph: DepGraph, keep: Mapping[str, Any], *, check: bool = True) -> tuple[Program, RemovalRecord]:
    """Do what `resize` does on a copy of the analysed program, which stays as it is; to try widths.

    Args:
        graph: Coupling analysis of the program.
        keep: As for `resize`.
        check: Whether the copy is verified. Without it the copy is good for counting only, in half of the time.

    Returns:
        The smaller copy, and what stayed.
    """
    graph.check_current()
    program = graph.program
    kept = check_keep(graph, dict(keep))
    rz = Resizer(graph.analysis, kept)
    for constraint in graph.analysis.constraints:
        left = rz.size(constraint.axis)
        if rz.changed(constraint.axis) and left % constraint.groups:
            involved = set(leaves(constraint.axis))
            names = [name for name in keep if find(graph[name].axis) in involved]
            steps = "; ".join(f"{name!r} goes in steps of {graph[name].step}" for name in names)
            raise PreconditionError(
                f"{left} channels would be left for {where(constraint.node)}, which takes them in {constraint.groups} "
                f"equal parts: {steps}; keep widths that fit, as CouplingGroup.legal_keep and reconcile do"
            )
    old = program.graph_module
    work = program.copy()
    new_of = dict(zip(old.graph.nodes, work.graph_module.graph.nodes, strict=True))
    tensors = _cut_tensors(graph, rz, work)
    on_copy = rz.on_copy({twin: node for node, twin in new_of.items()})
    for node, twin in new_of.items():
        if node.op == "call_function":
            rule = rule_for(node.target)
            if rule is not None and rule.resize is not None:
                rule.resize(on_copy, twin)
    _record_shapes(rz, new_of, work)
    if check:
        verify(work)
        work.graph_module.recompile()
    cuts = {name: {d: cut.kept for d, cut in dims.items()} for name, dims in tensors.items()}
    groups = {
        name: TensorCut(tuple(np.asarray(rz.kept(graph[name].axis)).tolist()), graph[name].size)
        for name in keep
        if rz.changed(graph[name].axis)
    }
    gone = {name for name, cut in groups.items() if len(cut.kept) == 1}
    work.group_names = names_after(graph.groups, program.group_names, cuts, gone)
    return work, RemovalRecord(groups, tensors)


def reconcile(graph: DepGraph, keep: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Drop from ``keep`` the groups that together would leave a group norm an indivisible number of channels.

    A group's own step is enough when it shrinks alone. Where two groups are factors of the same channels (a grouped
    convolution before a group norm), shrinking both may not be legal; then the later one keeps its width.

    Returns:
        What can be removed together, and for each group that was dropped the reason.
    """
    allowed, dropped = dict(keep), dict[str, str]()
    while True:
        rz = Resizer(graph.analysis, check_keep(graph, allowed))
        broken = next(
            (c for c in graph.analysis.constraints if rz.changed(c.axis) and rz.size(c.axis) % c.groups), None
        )
        if broken is None:
            return allowed, dropped
        involved = set(leaves(broken.axis))
        name = next(n for n in reversed(allowed) if find(graph[n].axis) in involved)
        left = rz.size(broken.axis)
        dropped[name] = (
            f"with the other removals {left} channels would be left for {broken.groups} groups of %{broken.node.name}"
        )
        del allowed[name]


def _cut_tensors(graph: DepGraph, rz: Resizer, work: Program) -> dict[str, dict[int, TensorCut]]:
    gm = work.graph_module
    made: dict[Hashable, Tensor] = {}
    cut_of: dict[Axis, TensorCut] = {}
    record: dict[str, dict[int, TensorCut]] = {}
    for node in graph.program.nodes:
        dims = graph.analysis.dims.get(node)
        if node.op != "get_attr" or not dims or str(node.target) in record:
            continue
        cuts = {}
        for d, axis in enumerate(map(find, dims)):
            kept = rz.kept(axis)
            if kept is None:
                continue
            if axis not in cut_of:
                cut_of[axis] = TensorCut(tuple(kept.tolist()), int(axis.size))
            cuts[d] = cut_of[axis]
        if not cuts:
            continue
        name = str(node.target)
        tensor = get_tensor(gm, name)
        assert tensor is not None
        key = tensor_identity(tensor)
        if key not in made:
            made[key] = cut_tensor(name, tensor, cuts)
        record[name] = cuts
        set_tensor(gm, name, _tied(made[key], tensor))
    return record


def _tied(new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` for another name of the tensor it was made from: itself, or its memory as what ``old`` is."""
    if isinstance(new, nn.Parameter) == isinstance(old, nn.Parameter) and new.requires_grad == old.requires_grad:
        return new
    return nn.Parameter(new.detach(), old.requires_grad) if isinstance(old, nn.Parameter) else new.detach()


def _record_shapes(rz: Resizer, new_of: Mapping[Node, Node], work: Program) -> None:
    """Record in each node's ``val`` the shape that its axes say; the verifier compares it with what the operator gives."""
    mode = fake_mode(work.graph_module)
    for node, twin in new_of.items():
        twin.meta["val"] = _reshaped(rz, rz.analysis.dims.get(node), node.meta.get("val"), mode)


def _reshaped(rz: Resizer, dims: Any, value: Any, mode: FakeTensorMode) -> Any:
    if not dims:
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_reshaped(rz, d, v, mode) for d, v in zip(dims, value, strict=True))
    if not is_tensor(value) or not any(rz.changed(axis) for axis in dims):
        return value
    if any(not isinstance(size, int) and rz.changed(axis) for size, axis in zip(value.shape, dims, strict=True)):
        shape = [_new_size(rz, axis, size) for axis, size in zip(dims, value.shape, strict=True)]
    else:
        shape = [rz.size(axis) if rz.changed(axis) else size for axis, size in zip(dims, value.shape, strict=True)]
    return fake_tensor(mode, value, shape)


def _new_size(rz: Resizer, axis: Axis, size: Any) -> Any:
    """Return the new size of a dimension that is a dynamic factor times static ones (batch times heads)."""
    if not rz.changed(axis):
        return size
    for factor in factors(axis):
        if rz.changed(factor):
            size = size // int(factor.size) * rz.size(factor)
    return size
