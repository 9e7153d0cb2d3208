"""What nothing reads: nodes that no result depends on, parameters and buffers that no node reads."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule

from ..graph.dataflow import dataflow
from ..graph.program import Program


def erase_unseen(program: Program) -> int:
    """Erase what no result depends on, operators in place among it; drop the tensors that only it read.

    Returns:
        How many nodes. Inputs stay.
    """
    gm, erased = program.graph_module, 0
    live = dataflow(program).live()
    for node in reversed(list(gm.graph.nodes)):
        if node not in live and node.op != "placeholder":
            gm.graph.erase_node(node)
            erased += 1
    gm.delete_all_unused_submodules()
    drop_unread(gm)
    return erased


def drop_unread(gm: GraphModule, among: Collection[str] | None = None) -> None:
    """Unregister every parameter and buffer that no node reads, or only those of the names in ``among``.

    The tensors themselves, which the caller's module may share, are left as they are.
    """
    graphs = [(prefix, module.graph) for prefix, module in gm.named_modules() if isinstance(module, GraphModule)]
    read = {_join(prefix, str(n.target)) for prefix, graph in graphs for n in graph.nodes if n.op == "get_attr"}
    for prefix, module in gm.named_modules():
        for registry in (module._parameters, module._buffers):
            for name in list(registry):
                full = _join(prefix, name)
                if full not in read and (among is None or full in among):
                    del registry[name]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
