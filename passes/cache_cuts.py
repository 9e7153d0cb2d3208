"""Cache insertion at given nodes: a refresh program that also returns their values, and programs that take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch.fx import Node

from ..graph.errors import PreconditionError
from ..graph.plan import Stage
from ..graph.program import Program
from ..graph.rewriter import Rewriter
from ..graph.schedules import REFRESH
from .eliminate_dead_code import eliminate

aten = torch.ops.aten


def cut_stages(
    program: Program, rule: str, cuts: Mapping[str, Node], patterns: Mapping[str, Collection[str]]
) -> dict[str, Stage]:
    """Return the stages of a plan that keeps the values of ``cuts`` between evaluations.

    Args:
        program: Becomes the refresh program.
        rule: Name of the pass, for the new nodes.
        cuts: Nodes of ``program`` by the name of the register that keeps their value.
        patterns: For every reuse stage the registers it takes instead of computing them. Whatever only they needed is
            gone from its program, parameters included; its inputs stay, so that all stages are called alike.

    Returns:
        ``refresh``, which writes the registers that any pattern reads, and a stage for each pattern.
    """
    stages = {}
    for name, reads in patterns.items():
        reuse = program.copy()
        reads = [register for register in cuts if register in reads]
        _take(reuse, rule, {register: cuts[register].name for register in reads})
        stages[name] = Stage(reuse, reads=tuple(reads))
    writes = [register for register in cuts if any(register in reads for reads in patterns.values())]
    if writes:
        _give(program, rule, {register: cuts[register] for register in writes})
    program.changed()
    return {REFRESH: Stage(program, writes=tuple(writes)), **stages}


def require_timestep(rule: str, program: Program, timestep: str) -> None:
    """Raise `PreconditionError` unless the program has an input of that name."""
    names = [spec.name for spec in program.inputs if spec.is_tensor]
    if timestep not in names:
        raise PreconditionError(
            f"{rule} needs to know the time, and {program.name} has no input '{timestep}'; its inputs are "
            f"{', '.join(names)}: set timestep to one of them"
        )


def _take(program: Program, rule: str, cuts: Mapping[str, str]) -> None:
    """Let inputs stand for the named nodes, and erase what is dead then."""
    rewriter = Rewriter(program, rule)
    nodes = {node.name: node for node in program.nodes}
    for register, name in cuts.items():
        kept = rewriter.placeholder_like(register, nodes[name])
        nodes[name].replace_all_uses_with(kept)
    eliminate(program)
    program.changed()


def _give(program: Program, rule: str, cuts: Mapping[str, Node]) -> None:
    """Return the values of nodes, as copies: an operator in place may write over them later."""
    rewriter = Rewriter(program, rule)
    copies = {
        register: rewriter.call(aten.clone.default, node, origin=next(iter(node.users)))
        for register, node in cuts.items()
    }
    rewriter.outputs(copies)
