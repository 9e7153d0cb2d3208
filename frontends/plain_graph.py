"""From the graph that `torch.export` gives to the one that a Program holds: flat, without checks and mode regions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from ..graph.program import copy_graph_module, register

_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def plain_graph(exported: torch.export.ExportedProgram) -> tuple[GraphModule, pytree.TreeSpec]:
    """Return the graph of an exported program, which returns a flat tuple, and the structure of its result.

    The exported program is used up: its graph is rewritten. ``exported.module()`` would copy it three times and write
    the Python code of each copy.
    """
    gm, out_spec = exported.graph_module, exported.call_spec.out_spec
    assert out_spec is not None
    _read_state(gm, exported)
    _flatten_output(gm)
    _inline_mode_regions(gm)
    drop_checks(gm.graph)
    gm = copy_graph_module(gm)
    name_inputs(gm.graph)
    gm.recompile()
    gm.graph.lint()
    return gm, out_spec


def _read_state(gm: GraphModule, exported: torch.export.ExportedProgram) -> None:
    """Let the graph read parameters, buffers and constants from its module, where export makes inputs of them."""
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("tensor_meta", None)  # which `quick_trace` left empty
    signature = exported.graph_signature
    # Before its passes, an exported program writes its buffers with operators and returns none of them.
    assert all(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            continue
        assert spec.target is not None
        stored = exported.state_dict if spec.target in exported.state_dict else exported.constants
        # Constants of the code count as persistent: a state dict without them would not be the whole state.
        register(gm, spec.target, stored[spec.target], persistent=spec.persistent is not False)
        with gm.graph.inserting_after(node):
            read = gm.graph.create_node("get_attr", spec.target)
        read.meta = node.meta
        node.replace_all_uses_with(read)
        gm.graph.erase_node(node)


def _flatten_output(gm: GraphModule) -> None:
    output = next(iter(reversed(gm.graph.nodes)))
    assert output.op == "output"
    leaves, _ = pytree.tree_flatten(output.args[0])
    output.args = (tuple(leaves),)


def drop_checks(graph: Graph) -> None:
    """Erase export's guards and metadata assertions: the Program checks its inputs itself."""
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", str(node.target))
        is_check = (node.op == "call_module" and str(node.target).startswith("_guards")) or (
            node.op == "call_function" and name.startswith(("_assert_", "sym_constrain", "_assert."))
        )
        if is_check and not node.users:
            graph.erase_node(node)
    # What only fed a check (comparisons of sizes) is left without users.
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and _is_scalar_arithmetic(node):
            graph.erase_node(node)


def name_inputs(graph: Graph) -> None:
    """Name each input after its node, which is unique in the generated code; `InputSpec` has the caller's name.

    An input that is called ``torch``, ``class`` or like a parameter would be lost in that code, or break it.
    """
    for node in graph.find_nodes(op="placeholder"):
        node.target = node.name


def _is_scalar_arithmetic(node: Node) -> bool:
    module = getattr(node.target, "__module__", "")
    # Read by nobody, `item` is what a check of values left behind; the verifier cannot follow it without its symbol.
    reads = (torch.ops.aten.sym_size.int, torch.ops.aten.item.default, torch.sym_ite, torch.sym_not)
    return module in ("_operator", "math") or node.target in reads


def _inline_mode_regions(gm: GraphModule) -> None:
    """Replace regions under a changed gradient or autocast mode by their body.

    Both modes are facts of how the model was written, not of what it computes here: a captured program is
    differentiated through parameters, and these regions make tables (rotary embeddings, masks). A region
    under *enabled* autocast does change the numbers and stays, so that the analysis freezes it.
    """
    for node in list(gm.graph.nodes):
        if node.target is _GRAD_MODE:
            body_node, inputs = node.args[1], node.args[2:]
        elif node.target is _AUTOCAST and not node.args[2]:
            body_node, inputs = node.args[4], node.args[5:]
        else:
            continue
        body = getattr(gm, body_node.target)
        _inline_mode_regions(body)
        with gm.graph.inserting_before(node):
            result = _inline(gm, str(body_node.target), body, inputs)
        for user in list(node.users):
            if user.target is operator.getitem and isinstance(result, (tuple, list)):
                user.replace_all_uses_with(result[user.args[1]])
                gm.graph.erase_node(user)
            else:
                user.replace_input_with(node, result)
        gm.graph.erase_node(node)
        if not body_node.users:
            gm.graph.erase_node(body_node)
            delattr(gm, body_node.target)


def _inline(gm: GraphModule, name: str, body: GraphModule, inputs: Sequence[Any]) -> Any:
    """Copy the nodes of ``body`` to the insertion point; return what it returns, in terms of the copies."""
    env: dict[Node, Any] = {}
    placeholders = iter(inputs)
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(placeholders)
        elif inner.op == "output":
            return torch.fx.map_arg(inner.args[0], env.__getitem__)
        elif inner.op == "get_attr":
            target = f"{name}_{inner.target}".replace(".", "_")
            gm.register_buffer(target, getattr(body, inner.target), persistent=False)
            env[inner] = gm.graph.get_attr(target)
            env[inner].meta = dict(inner.meta)
        else:
            env[inner] = gm.graph.node_copy(inner, env.__getitem__)
    raise AssertionError("a graph has an output")
