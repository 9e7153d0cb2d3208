"""From a flat program to an ONNX model in memory: re-export, conversion, names, order."""

from __future__ import annotations

import logging
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from ..graph.errors import ExportError, where
from ..graph.interface import InputSpec
from .artifacts import summary
from .flat import FlatProgram
from .onnx_constants import optimize_exactly
from .onnx_grouped import translations
from .onnx_order import order_for_runtime

OLDEST_OPSET = 18
OPSET, OPSET_WITH_GROUP_NORM = 23, 20


@dataclass(frozen=True)
class Converted:
    """An ONNX model in memory.

    Attributes:
        program: The ``torch.onnx.ONNXProgram``; its ``model`` is an ``onnx_ir.Model``.
        guards: What the re-export assumes of the dynamic dimensions, in their names.
        outputs: For each output its dimensions: sizes, or expressions in the names of dynamic dimensions.
    """

    program: Any
    guards: tuple[str, ...]
    outputs: tuple[tuple[int | str, ...], ...]


def choose_opset(gm: GraphModule) -> tuple[int, str]:
    """Return the opset that suits a graph, and why.

    Opset 23 has attention and RMS norm as operators, with kernels. It also has a group norm without one on the CPU,
    which ONNX Runtime then expands into about thirty operators; below opset 21 the exporter writes an instance norm.
    """
    group_norms = len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.group_norm.default))
    if group_norms:
        return OPSET_WITH_GROUP_NORM, f"{group_norms} group norms become one kernel each below opset 21"
    return OPSET, "attention and RMS norm stay one operator"


def convert(flat: FlatProgram, example: Sequence[torch.Tensor], opset: int) -> Converted:
    """Re-export a cleaned flat program and convert it.

    Raises:
        ExportError: ``torch.export`` or ``torch.onnx`` refuses the graph, or gives another opset.
    """
    exported = _reexport(flat, example)
    try:
        with _quiet():
            onnx_program = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                external_data=True,
                verbose=False,
                custom_translation_table=translations(exported.graph_module),
            )
            assert onnx_program is not None
            optimize_exactly(onnx_program)
    # The exporter raises whatever a translation raises; the message below keeps each step of the chain.
    except Exception as err:
        raise ExportError(_conversion_failure(err, exported)) from err
    model = onnx_program.model
    if model.opset_imports.get("") != opset:
        raise ExportError(
            f"asked for ONNX opset {opset}, torch {torch.__version__} gives {model.opset_imports.get('')}; "
            "choose another opset"
        )
    labels = _symbol_labels(exported, flat.inputs)
    _strip_metadata(model)
    _widen_rotary_tables(model)
    _rename_dimensions(model, labels)
    _rename_ends(model, [spec.name for spec in flat.inputs], flat.outputs)
    order_for_runtime(model)
    shapes = tuple(tuple(_plain_size(dim) for dim in value.shape or ()) for value in model.graph.outputs)
    return Converted(onnx_program, _guards(exported, flat.inputs, labels), shapes)


def _reexport(flat: FlatProgram, example: Sequence[torch.Tensor]) -> ExportedProgram:
    shapes = tuple(
        {dim: Dim.DYNAMIC for dim, size in enumerate(spec.shape) if isinstance(size, str)} or None
        for spec in flat.inputs
    )
    try:
        return torch.export.export(flat.module, tuple(example), dynamic_shapes=shapes, strict=False)
    except Exception as err:
        labels = sorted({size for spec in flat.inputs for size in spec.shape if isinstance(size, str)})
        raise ExportError(
            f"torch.export does not take the graph again with the dynamic dimensions {labels}: {str(err).strip()}\n"
            "capture it with the dimensions it names static"
        ) from err


def _conversion_failure(err: BaseException, exported: ExportedProgram) -> str:
    steps: list[str] = []
    cause: BaseException | None = err
    while cause is not None:
        steps.append(summary(cause))
        cause = cause.__cause__
    told = " <- ".join(dict.fromkeys(steps[1:] or steps))
    advice = "replace the operator in the model, or register a translation with torch.onnx"
    found = re.search(r"translating node %(\w+)", told)
    node = _find_node(exported, found[1]) if found else None
    if node is None:
        return f"torch.onnx has no ONNX form for this program: {told}\n{advice}"
    # The chain ends with the cause; its first step only repeats the node.
    reason = "" if steps[-1].startswith("No ONNX function found") else f": {steps[-1]}"
    return f"torch.onnx has no ONNX form for {node.target}{reason}\n  at {where(node)}\n{advice}"


def _find_node(exported: ExportedProgram, name: str) -> torch.fx.Node | None:
    """Return the node of this name, which may be one of those that the exporter decomposes others into."""
    with _quiet():
        decomposed = exported.run_decompositions()
    graphs = (exported.graph, decomposed.graph)
    return next((node for graph in graphs for node in graph.nodes if node.name == name), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two messages of the exporter about torch itself, nothing about the model."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _symbol_labels(exported: ExportedProgram, inputs: Sequence[InputSpec]) -> dict[str, str]:
    """Map torch's symbols to the names of the dynamic dimensions they stand for."""
    labels: dict[str, str] = {}
    for node, spec in zip(_user_inputs(exported), inputs, strict=True):
        for size, label in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(label, str) and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                labels.setdefault(str(size.node.expr), label)
    return labels


def _user_inputs(exported: ExportedProgram) -> list[torch.fx.Node]:
    names = set(exported.graph_signature.user_inputs)
    return [node for node in exported.graph.find_nodes(op="placeholder") if node.name in names]


def _guards(exported: ExportedProgram, inputs: Sequence[InputSpec], labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return what the re-export assumes of sizes, such as ``(width % 2) == 0``, in the names of dimensions.

    The ONNX file has no assertions, so these are all that remains of the guards. Those that always hold are left out.
    """
    specs = {node.name: spec for node, spec in zip(_user_inputs(exported), inputs, strict=True)}
    found: dict[str, None] = {}
    # Not public; without it the report has no guards, and the second shape still tells.
    for code in getattr(exported, "_guards_code", ()):
        parts = re.split(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", code)
        sizes = [specs[name].shape[int(dim)] for name, dim in zip(parts[1::3], parts[2::3], strict=True)]
        variables = {size: f"size{i}" for i, size in enumerate(dict.fromkeys(sizes))}
        if not _always_holds(_join(parts[::3], [variables[size] for size in sizes]), list(variables.values())):
            found[_join(parts[::3], [str(size) for size in sizes])] = None
    return tuple(found)


def _join(texts: Sequence[str], between: Sequence[str]) -> str:
    return "".join(text + name for text, name in zip(texts, [*between, ""], strict=True))


def _always_holds(code: str, variables: Sequence[str]) -> bool:
    """Whether a guard is true whatever the sizes are, tried on a few hundred draws."""
    draw = random.Random(0)
    sizes = (2, 3, 4, 5, 7, 8, 16, 31, 64, 1000, 4097, 100_003)
    try:
        compiled = compile(code, "guard", "eval")
        return all(
            eval(compiled, {"__builtins__": {}}, {name: draw.choice(sizes) for name in variables}) for _ in range(300)
        )
    except (SyntaxError, NameError, TypeError, ArithmeticError):
        return False  # it calls something of torch's own: report it as it is


def _strip_metadata(model: Any) -> None:
    """Remove stack traces, which hold paths of the exporting machine, and torch's own names of parameters and sizes.

    They are half of a small file. Where a node comes from in the module tree stays.
    """
    for name in [name for name in model.graph.metadata_props if name.startswith("pkg.torch.export.")]:
        del model.graph.metadata_props[name]
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        node.doc_string = None


def _widen_rotary_tables(model: Any) -> None:
    """Expand the tables of every RotaryEmbedding to the batch of its input.

    The exporter's fusion to this operator (at opset 23) drops the broadcast of tables with batch 1, which is how
    models make them, and ONNX Runtime then refuses the node.
    """
    import onnx_ir as ir

    widened: dict[tuple[int, str], Any] = {}
    for node in list(model.graph.all_nodes()):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
            continue  # with position ids, the fourth input, the tables have no batch
        x = node.inputs[0]
        for position in (1, 2):
            table = node.inputs[position]
            batch_size = _table_batch(table)
            if batch_size is not None and batch_size == x.shape[0]:
                continue
            key = (id(table), str(x.shape[0]))
            if key not in widened:
                batch = ir.node("Shape", [x], {"start": 0, "end": 1})
                ones = ir.node("Constant", [], {"value": ir.tensor([1, 1], dtype=ir.DataType.INT64)})
                shape = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
                expand = ir.node("Expand", [table, shape.outputs[0]])
                node.graph.insert_before(node, [batch, ones, shape, expand])
                widened[key] = expand.outputs[0]
                widened[key].type = x.type
            node.replace_input_with(position, widened[key])


def _table_batch(table: Any) -> Any:
    # The fusion leaves its sines and cosines without shape and type; they are those of the argument.
    producer = table.producer()
    if table.shape is None and producer is not None and producer.op_type in ("Cos", "Sin"):
        table.shape, table.type = producer.inputs[0].shape, producer.inputs[0].type
    return table.shape[0] if table.shape else None


def _plain_size(dim: Any) -> int | str:
    return dim if isinstance(dim, int) else str(getattr(dim, "value", dim))


def _rename_dimensions(model: Any, labels: Mapping[str, str]) -> None:
    """Write ``batch`` for ``s77``, also inside expressions such as ``2*s77``."""
    if not labels:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, labels)) + r")\b")
    for value in _values(model):
        if value.shape is None:
            continue
        shape = value.shape.copy()  # the exporter shares some between values and freezes them
        for position, dim in enumerate(value.shape):
            text = getattr(dim, "value", None)
            if isinstance(text, str):
                shape[position] = symbol.sub(lambda found: labels[found[1]], text)
        value.shape = shape


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _rename_ends(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the model's inputs and outputs these names; inner values that have one of them get another."""
    ends = [*zip(model.graph.inputs, inputs, strict=True), *zip(model.graph.outputs, outputs, strict=True)]
    wanted = {name for _, name in ends}
    own = {id(value) for value, _ in ends}
    taken = {value.name for value in _values(model)} | wanted
    for value in list(_values(model)):
        if value.name in wanted and id(value) not in own:
            fresh = next(
                f"{value.name}_inner{i}" for i in range(len(taken) + 1) if f"{value.name}_inner{i}" not in taken
            )
            taken.add(fresh)
            value.name = fresh
    for value, name in ends:
        value.name = name
