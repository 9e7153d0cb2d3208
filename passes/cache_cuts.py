"""Cache insertion at given nodes: a refresh program that also returns their values, and programs that take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch.fx import Node

from ..graph.cost import cost
from ..graph.dataflow import Dataflow, dataflow
from ..graph.errors import PreconditionError, where
from ..graph.plan import Stage
from ..graph.program import Program
from ..graph.rewriter import Rewriter
from ..graph.schedules import REFRESH
from .unread import erase_unseen

aten = torch.ops.aten


def cut_stages(
    program: Program, rule: str, cuts: Mapping[str, Node], patterns: Mapping[str, Collection[str]]
) -> dict[str, Stage]:
    """Return the stages of a plan that keeps the values of ``cuts`` between evaluations.

    Args:
        program: Becomes the refresh program.
        rule: Name of the pass, for the new nodes.
        cuts: Nodes of ``program`` by the name of the register that keeps their value, as it is when it is computed:
            what operators in place make of it afterwards is computed anew.
        patterns: For every reuse stage the registers it takes instead of computing them. Whatever only they needed is
            gone from its program, parameters included; its inputs stay, so that all stages are called alike.

    Returns:
        ``refresh``, which writes the registers that any pattern reads, and a stage for each pattern.

    Raises:
        PreconditionError: A value is changed in place through a tensor that shares memory with it.
    """
    flow = dataflow(program)
    for node in cuts.values() if flow.writes else ():
        _require_own_value(rule, flow, node)
    stages = {}
    for name, reads in patterns.items():
        reuse = program.copy()
        reads = [register for register in cuts if register in reads]
        _take(reuse, rule, {register: cuts[register].name for register in reads})
        stages[name] = Stage(reuse, reads=tuple(reads))
    writes = [register for register in cuts if any(register in reads for reads in patterns.values())]
    if writes:
        _give(program, rule, flow, {register: cuts[register] for register in writes})
    program.changed()
    return {REFRESH: Stage(program, writes=tuple(writes)), **stages}


def live_macs(program: Program, taken: Collection[Node]) -> int:
    """Return the multiply-accumulates of what is still computed when the values of nodes are taken from elsewhere."""
    live: set[str] = set()
    queue = [program.graph_module.graph.output_node()]
    while queue:
        node = queue.pop()
        if node not in taken and node.name not in live:
            live.add(node.name)
            queue += node.all_input_nodes
    return sum(entry.macs for entry in cost(program).nodes if entry.node in live)


def require_timestep(rule: str, program: Program, timestep: str) -> None:
    """Raise `PreconditionError` unless the program has an input of that name."""
    names = [spec.name for spec in program.inputs if spec.is_tensor]
    if timestep not in names:
        raise PreconditionError(
            f"{rule} needs to know the time, and {program.name} has no input '{timestep}'; its inputs are "
            f"{', '.join(names)}: set timestep to one of them"
        )


def require_order(rule: str, order: int) -> None:
    """Raise `PreconditionError` unless ``order`` is one of a polynomial."""
    if order < 0:
        raise PreconditionError(f"{rule}: extrapolation must be 0 or more, the order of a polynomial, got {order}")


def _require_own_value(rule: str, flow: Dataflow, cut: Node) -> None:
    """Raise unless all that happens to the memory of ``cut`` after it happens through ``cut``.

    Otherwise an input in its place, which has memory of its own, would miss a change, or others would miss those made
    to it.
    """
    after = [n for n in flow.order if flow.order[n] > flow.order[cut]]
    own = {cut}
    for node in after:  # views of the cut, and results of operators that write into it
        if flow.memory[node] & flow.memory[cut] and own & set(node.all_input_nodes):
            own.add(node)
    changed = False
    for node in after:
        shared = [n for n in node.all_input_nodes if flow.memory[n] & flow.memory[cut]]
        changed |= bool(flow.writes.get(node, frozenset()) & flow.memory[cut])
        if changed and not own.issuperset(shared):
            raise PreconditionError(
                f"{rule} cannot keep {where(cut)}: {where(node)} shares its memory, in which values are changed in place; "
                "let the model compute these values out of place, or clone them before"
            )


def _take(program: Program, rule: str, cuts: Mapping[str, str]) -> None:
    """Let inputs stand for the named nodes, and erase what is dead then."""
    rewriter = Rewriter(program, rule)
    nodes = {node.name: node for node in program.nodes}
    inputs = []
    for register, name in cuts.items():
        kept = rewriter.placeholder_like(register, nodes[name])
        nodes[name].replace_all_uses_with(kept)
        inputs.append(kept)
    flow = dataflow(program)
    changed = {maker for makers in flow.writes.values() for maker in makers}
    for kept in changed.intersection(inputs):
        # The register is the caller's, and the next evaluation reads it again.
        own = rewriter.call(aten.clone.default, kept, origin=min(kept.users, key=flow.order.__getitem__))
        kept.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
    erase_unseen(program)
    program.changed()


def _give(program: Program, rule: str, flow: Dataflow, cuts: Mapping[str, Node]) -> None:
    """Return the values of nodes, as copies: an operator in place may write over them later."""
    rewriter = Rewriter(program, rule)
    copies = {
        register: rewriter.call(aten.clone.default, node, origin=min(node.users, key=flow.order.__getitem__))
        for register, node in cuts.items()
    }
    rewriter.outputs(copies)
