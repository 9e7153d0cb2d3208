"""Gated branches: a program in which gates mix every residual branch with its value of an earlier evaluation.

before: h = x + g * f(x)
after:  full:  r = f(x); h = x + g * r; return ..., r
        gated: r = f(x); h = x + g * (gate * r + (1 - gate) * cached); cached values and gates are inputs

A gate of 1 computes the branch and one of 0 takes the cached value, so gates of 0 and 1 give what
`InsertLayerCache` gives, and the gradient with respect to those in between says what a branch is worth.

Paper: Learning-to-Cache (arXiv 2406.01733), section 3.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..graph.errors import PreconditionError
from ..graph.joins import residual_joins
from ..graph.program import Program, set_tensor, tensor_identity
from ..graph.rewriter import Rewriter
from ..graph.schedules import REFRESH, REUSE
from ..graph.verify import verify
from .cache_cuts import cut_stages
from .insert_layer_cache import branch_register

aten = torch.ops.aten

RULE = "gated-program"
# Name of the input that holds the gates.
GATE = "gate"


@dataclass(frozen=True)
class GatedProgram:
    """The programs that a router is trained with. Their parameters share the caller's memory and take no gradient.

    Attributes:
        plain: The program as it was.
        full: Returns ``(result, {"cached_branch_<j>": value})`` for all branches.
        gated: Takes ``gate``, ``[branches]``, and every ``cached_branch_<j>`` as further keywords; returns the result.
        kinds: Of the branches in graph order, ``attention`` or ``mlp``.
    """

    plain: Program
    full: Program
    gated: Program
    kinds: tuple[str, ...]

    @property
    def open_gates(self) -> Tensor:
        """Gates of 1 for all branches, ``[branches]``, as `gated` takes them."""
        return self.gated.example[-1].clone()


def gated_program(program: Program) -> GatedProgram:
    """Return ``program`` with all branches as further results, and with gated branches. It is not changed.

    Gates have float32, or the branches' dtype where that is wider; the mixing happens in the dtype of the gates.

    Raises:
        PreconditionError: The program has no residual branches, or an input named ``gate``.
    """
    plain = _frozen(program)
    joins = residual_joins(plain)
    if not joins:
        raise PreconditionError(
            f"{program.name} has no residual branches with layers in them that gates could stand at"
        )
    gated = plain.copy()
    _insert_gates(gated, [join.branch.name for join in joins])
    full = plain.copy()
    nodes = {node.name: node for node in full.nodes}
    cuts = {branch_register(i): nodes[join.branch.name] for i, join in enumerate(joins)}
    stages = cut_stages(full, RULE, cuts, {REUSE: cuts})
    verify(stages[REFRESH].program)
    verify(gated)
    return GatedProgram(plain, stages[REFRESH].program, gated, tuple(join.kind for join in joins))


def _frozen(program: Program) -> Program:
    """Return a copy whose parameters are handles without gradients on the same memory."""
    copy = program.copy()
    handles: dict[Hashable, nn.Parameter] = {}
    for name, parameter in copy.parameters().items():
        handle = handles.setdefault(tensor_identity(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
        set_tensor(copy.graph_module, name, handle)
    return copy


def _insert_gates(program: Program, names: list[str]) -> None:
    """Let every user of the named nodes read the mixture of the node and an input."""
    rewriter = Rewriter(program, RULE)
    nodes = {node.name: node for node in program.nodes}
    order = {node: i for i, node in enumerate(program.nodes)}
    branches = [nodes[name] for name in names]
    dtype = torch.float32
    for branch in branches:
        dtype = torch.promote_types(dtype, branch.meta["val"].dtype)
    cached = [rewriter.placeholder_like(branch_register(i), branch) for i, branch in enumerate(branches)]
    device = branches[0].meta["val"].device
    gates = rewriter.placeholder(GATE, torch.ones(len(branches), dtype=dtype, device=device))
    for i, branch in enumerate(branches):
        _mix(rewriter, branch, cached[i], gates, i, min(branch.users, key=order.__getitem__))
    program.changed()


def _mix(rewriter: Rewriter, branch: Node, cached: Node, gates: Node, number: int, before: Node) -> None:
    """Insert the mixture of ``branch`` and ``cached`` before the first user, for all users."""
    own, wide = branch.meta["val"].dtype, gates.meta["val"].dtype
    new, old = branch, cached
    if own is not wide:
        new = rewriter.call(aten.to.dtype, branch, wide, origin=before)
        old = rewriter.call(aten.to.dtype, cached, wide, origin=before)
    gate = rewriter.call(aten.select.int, gates, 0, number, origin=before)
    # Not lerp, which torch cannot derive shapes of where a size is symbolic. Two products are exact at 0 and at 1.
    share = rewriter.call(aten.mul.Tensor, new, gate, origin=before)
    rest = rewriter.call(aten.rsub.Scalar, gate, 1, origin=before)
    mixed = rewriter.call(
        aten.add.Tensor, share, rewriter.call(aten.mul.Tensor, old, rest, origin=before), origin=before
    )
    result = mixed if own is wide else rewriter.call(aten.to.dtype, mixed, own, origin=before)
    made = {new, share}
    branch.replace_all_uses_with(result, delete_user_cb=lambda user: user not in made)
