"""Unread tensors: parameters and buffers that a graph module holds and no node reads."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule


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
