"""A Program as one document of plain data, next to the tensors it owns, and back.

The document holds the graph (operators by qualified name), what is recorded of every value, where nodes come
from, the trees of inputs and outputs, and a record of every tensor, without the tensors' data. Sizes that vary
are symbols; reading makes a fresh ``ShapeEnv`` with one symbol for each.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .encoding import decode, decode_target, defining_module, encode, encode_target
from .errors import ArtifactError, source_line
from .interface import Interface
from .names import GroupName
from .program import Program
from .symbols import SymbolTable, decode_path, encode_path
from .tensor_records import attach, tensor_records
from .values import decode_value, describe, empty, encode_value, symbols_of

# What the document says in another way, or what only torch's own tracing needs.
_NOT_KEPT = frozenset(
    "val tensor_meta example_value eager_input_vals from_node stack_trace nn_module_stack unbacked_bindings".split()
)
_OPS = frozenset({"placeholder", "get_attr", "call_function", "output"})


def encode_program(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``(document, tensors by name)``; tied tensors appear once, those on ``meta`` not at all.

    Raises:
        ArtifactError: Something in the program has no saved form; names the node and why.
    """
    gm = program.graph_module
    records, data = tensor_records(gm)
    tables = _Tables()
    graph = tables.graph(gm)
    document = {
        **Interface.of(program).encode(),
        "notes": list(program.notes),
        "group_names": [asdict(name) for name in program.group_names],
        "example": [_encode_example(leaf) for leaf in program.example],
        "symbols": _symbols(program),
        "operators": tables.operators,
        "stacks": list(map(list, tables.stacks)),
        "sources": list(tables.sources),
        "tensors": records,
        "graph": graph,
    }
    return document, data


def decode_program(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor], example: Sequence[Any]
) -> tuple[Program, SymbolTable]:
    """Return the program of a document of `encode_program`, and the symbols of its dynamic sizes.

    Args:
        document: What `encode_program` returned.
        tensors: Every tensor of the document's records by name; they are used as they are, not copied.
        example: The flattened inputs of the capture.

    Raises:
        ArtifactError: The document is inconsistent, or an operator or a class is not available here.
    """
    form = Interface.decode(document)
    table = SymbolTable(
        {name: data["example"] for name, data in document["symbols"].items()},
        {name: data["label"] for name, data in document["symbols"].items()},
    )
    reader = _Reader(document, table, tensors)
    gm = reader.graph_module(document["graph"], "")
    placeholders = gm.graph.find_nodes(op="placeholder")
    if not len(placeholders) == len(form.inputs) == len(example):
        raise ArtifactError(f"the graph has {len(placeholders)} inputs, {len(form.inputs)} are described")
    program = Program(
        gm,
        form.inputs,
        form.in_spec,
        form.out_spec,
        tuple(example),
        form.name,
        tuple(map(str, document["notes"])),
        form.guards,
        tuple(_decode_group_name(data) for data in document.get("group_names", ())),
        form.signature,
    )
    return program, table


def _decode_group_name(data: Mapping[str, Any]) -> GroupName:
    return GroupName(str(data["name"]), str(data["tensor"]), int(data["dim"]), tuple(map(int, data["index"])))


# ---------------------------------------------------------------------- writing


class _Tables:
    """Collects what many nodes share: module stacks, source lines, foreign operators."""

    def __init__(self) -> None:
        self.stacks: dict[tuple[Any, ...], int] = {}
        self.sources: dict[str, int] = {}
        self.operators: dict[str, str] = {}

    def graph(self, gm: GraphModule) -> dict[str, Any]:
        inner = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), GraphModule):
                inner[str(node.target)] = self.graph(getattr(gm, str(node.target)))
        nodes = [self.node(node) for node in gm.graph.nodes]
        return {"nodes": nodes, "graphs": inner} if inner else {"nodes": nodes}

    def node(self, node: Node) -> dict[str, Any]:
        try:
            return self._node(node)
        except ArtifactError as err:
            raise ArtifactError(f"%{node.name} = {node.target}: {err}") from err

    def _node(self, node: Node) -> dict[str, Any]:
        if node.op not in _OPS:
            raise ArtifactError(f"a {node.op} node cannot be saved, only operators can; capture the program again")
        data: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "call_function":
            data["target"] = encode_target(node.target)
            module = defining_module(node.target)
            if module is not None:
                self.operators[node.target._schema.name] = module  # type: ignore[union-attr]
        elif node.op != "output":
            data["target"] = str(node.target)
        if node.args:
            data["args"] = [encode(arg) for arg in node.args]
        if node.kwargs:
            data["kwargs"] = {key: encode(arg) for key, arg in node.kwargs.items()}
        if node.op in ("placeholder", "call_function") and "val" in node.meta:
            data["val"] = encode_value(node.meta["val"])
        return data | self._origin(node)

    def _origin(self, node: Node) -> dict[str, Any]:
        data: dict[str, Any] = {}
        stack = node.meta.get("nn_module_stack")
        if stack:
            key = tuple((str(k), str(fqn), _type_name(kind)) for k, (fqn, kind, *_) in stack.items())
            data["stack"] = self.stacks.setdefault(key, len(self.stacks))
        source = source_line(node) if node.meta.get("stack_trace") else ""
        if source:
            data["source"] = self.sources.setdefault(source, len(self.sources))
        if node.meta.get("unbacked_bindings"):
            data["unbacked"] = {str(s): encode_path(path) for s, path in node.meta["unbacked_bindings"].items()}
        plain = {key: encode(v) for key, v in node.meta.items() if key not in _NOT_KEPT and _is_plain(v)}
        return data | ({"meta": plain} if plain else {})


def _type_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _encode_example(leaf: Any) -> dict[str, Any]:
    return {"tensor": describe(leaf)} if isinstance(leaf, Tensor) else {"constant": encode(leaf)}


def _symbols(program: Program) -> dict[str, Any]:
    """Return the example size and the label of every symbol in the recorded values."""
    known: dict[str, tuple[int, str]] = {}
    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    for node, spec, leaf in zip(placeholders, program.inputs, program.example, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
            continue
        for size, label, example in zip(value.shape, spec.shape, leaf.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                known.setdefault(size.node.expr.name, (int(example), str(label)))
    out: dict[str, Any] = {}
    for symbol, env in symbols_of(program.graph_module):
        if symbol.name not in out:
            example, label = known.get(symbol.name) or (_hint(symbol, env), symbol.name)
            out[symbol.name] = {"example": example, "label": label}
    return out


def _hint(symbol: Any, env: Any) -> int | None:
    """Return the example size of a symbol that no input has by itself; None for one that depends on data."""
    sizes = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    value = sizes.get(symbol)
    return None if value is None else int(value)


# ---------------------------------------------------------------------- reading


class _Reader:
    """Builds graph modules from a document, with values on the table's fake tensors."""

    def __init__(self, document: Mapping[str, Any], table: SymbolTable, tensors: Mapping[str, Tensor]) -> None:
        self.records: Mapping[str, Any] = document["tensors"]
        self.table, self.tensors = table, tensors
        self.operators = document["operators"]
        self.sources = document["sources"]
        self.stacks = [{key: (fqn, kind) for key, fqn, kind in stack} for stack in document["stacks"]]
        self.targets: dict[str, Any] = {}
        self.vals: dict[str, Any] = {}
        self.attached: set[str] = set()

    def graph_module(self, data: Mapping[str, Any], prefix: str) -> GraphModule:
        gm = GraphModule(nn.Module(), Graph())
        inner = data.get("graphs", {})
        for name, graph in inner.items():
            gm.add_module(_checked(name), self.graph_module(graph, f"{prefix}{name}."))
        graph = Graph()
        nodes: dict[str, Node] = {}
        for entry in data["nodes"]:
            node = self.node(graph, entry, nodes)
            nodes[node.name] = node
            if node.op == "get_attr" and node.target not in inner:
                name = f"{prefix}{node.target}"
                self.attach(gm, name, str(node.target))
                node.meta["val"] = self.fake(name)
        gm.graph = graph
        return gm

    def node(self, graph: Graph, data: Mapping[str, Any], nodes: Mapping[str, Node]) -> Node:
        op, name = data["op"], data["name"]
        if op not in _OPS:
            raise ArtifactError(f"%{name} is a {op} node, which this version does not load")
        try:
            target = self.target(op, data)
            args = tuple(decode(arg, nodes, self.operators) for arg in data.get("args", ()))
            kwargs = {_identifier(k): decode(v, nodes, self.operators) for k, v in data.get("kwargs", {}).items()}
            node = graph.create_node(op, target, args, kwargs, name=name)
            if node.name != name:
                raise ArtifactError("the name is taken or no identifier")
            if "val" in data:
                node.meta["val"] = decode_value(data["val"], self.table)
        except ArtifactError as err:
            raise ArtifactError(f"%{name}: {err}") from err
        self.origin(node, data)
        return node

    def target(self, op: str, data: Mapping[str, Any]) -> Any:
        if op == "output":
            return "output"
        name = data["target"]
        if op == "placeholder":
            return _identifier(name)
        if op == "get_attr":
            return _checked(name)
        if name not in self.targets:
            self.targets[name] = decode_target(name, self.operators)
        return self.targets[name]

    def origin(self, node: Node, data: Mapping[str, Any]) -> None:
        for key, value in data.get("meta", {}).items():
            node.meta[key] = decode(value)
        if "stack" in data:
            node.meta["nn_module_stack"] = dict(self.stacks[data["stack"]])
        if "source" in data:
            node.meta["stack_trace"] = self.sources[data["source"]] + "\n"
        if "unbacked" in data:
            bindings = {self.table.expression(s): decode_path(path) for s, path in data["unbacked"].items()}
            node.meta["unbacked_bindings"] = bindings

    def attach(self, gm: GraphModule, name: str, target: str) -> None:
        if name not in self.records or name not in self.tensors:
            raise ArtifactError(f"the graph reads '{name}', which is no tensor of the program")
        if name not in self.attached:
            attach(gm, target, self.tensors[name], self.records[name])
            self.attached.add(name)

    def fake(self, name: str) -> Any:
        if name not in self.vals:
            self.vals[name] = empty(describe(self.tensors[name]), self.table)
        return self.vals[name]


def _identifier(name: str) -> str:
    """Return a name that is about to become part of generated Python, or refuse it."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ArtifactError(f"{name!r} is no identifier")
    return name


def _checked(name: str) -> str:
    """Return a qualified name whose parts may be quoted in generated Python, or refuse it."""
    if not isinstance(name, str) or not re.fullmatch(r"[^\"\\\x00-\x1f.]+(\.[^\"\\\x00-\x1f.]+)*", name):
        raise ArtifactError(f"{name!r} is no qualified name")
    return name
