"""The form of a program that exporters take: a graph from tensors to tensors, with a name for each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node, map_arg

from ..graph.errors import ExportError, where
from ..graph.interface import InputSpec
from ..graph.plan import Staged
from ..graph.program import Program, copy_graph_module


@dataclass(frozen=True)
class FlatProgram:
    """A program without the inputs and outputs that are not tensors.

    Attributes:
        module: Takes the tensor inputs in order and returns a tuple of the tensor outputs. Its graph is a copy; its
            tensors are the program's.
        inputs: The tensor inputs.
        outputs: Names of the tensor outputs.
        constants: Name and value of the inputs that were constants of the capture.
        dropped: Name and value of the outputs that are not tensors.
        input_positions: Where the tensor inputs are among the program's flat inputs.
        output_positions: Where the tensor outputs are among the program's flat outputs.
    """

    module: GraphModule
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    dropped: dict[str, Any]
    input_positions: tuple[int, ...]
    output_positions: tuple[int, ...]

    def select_inputs(self, flat: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return the tensors among the program's flat inputs."""
        return tuple(flat[i] for i in self.input_positions)

    def select_outputs(self, flat: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return the tensors among the program's flat outputs."""
        return tuple(flat[i] for i in self.output_positions)


def flat_program(program: Program) -> FlatProgram:
    """Return ``program`` reduced to tensors; the program itself is left as it is.

    Raises:
        ExportError: The program's tensors or its example inputs are on the ``meta`` device, it has no tensor output,
            or it draws random numbers, so that no export can be compared with it.
    """
    require_exportable(program)
    gm = copy_graph_module(program.graph_module)
    constants: dict[str, Any] = {}
    kept: list[int] = []
    for index, (node, spec) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), program.inputs, strict=True)):
        if spec.is_tensor:
            kept.append(index)
            continue
        constants[spec.name] = spec.constant
        for user in list(node.users):
            _replace_by_value(user, node, spec.constant)
        gm.graph.erase_node(node)
    output = gm.graph.output_node()
    values = output.args[0]
    assert isinstance(values, tuple | list)
    names = output_names(program)
    positions = tuple(i for i, value in enumerate(values) if isinstance(_recorded(value), Tensor))
    if not positions:
        raise ExportError(f"{program.name} has no tensor among its outputs ({', '.join(names)}); nothing to export")
    dropped = {names[i]: _recorded(values[i]) for i in range(len(values)) if i not in positions}
    output.args = (tuple(values[i] for i in positions),)
    gm.graph.lint()
    gm.recompile()
    return FlatProgram(
        gm,
        tuple(program.inputs[i] for i in kept),
        tuple(names[i] for i in positions),
        constants,
        dropped,
        tuple(kept),
        positions,
    )


def output_names(program: Program) -> list[str]:
    """Return one name for each flat output, unique among inputs and outputs.

    It is the path in the caller's result (``logits``, ``aux.0``). A path that starts with a position has the prefix
    ``output_``, a lone tensor is ``output_0``, and a name that an input has already gets the prefix ``out_``.
    """
    taken = {spec.name for spec in program.inputs}
    names: list[str] = []
    for path in _leaf_paths(program.out_spec):
        name = re.sub(r"[^\w.]", "_", ".".join(path)) or "0"
        name = f"output_{name}" if name[0].isdigit() else name
        while name in taken:
            name = f"out_{name}"
        taken.add(name)
        names.append(name)
    return names


def _leaf_paths(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    # pytree can name the paths of registered types only when they were registered with a function for it, and the
    # output classes of diffusers are not. Types like dicts keep their keys in the context, named tuples their class.
    if spec.is_leaf():
        yield ()
        return
    children = spec.children()
    keys = getattr(spec.context, "_fields", spec.context)
    named = isinstance(keys, list | tuple) and len(keys) == len(children)
    for index, child in enumerate(children):
        for rest in _leaf_paths(child):
            yield (str(keys[index]) if named else str(index), *rest)


def require_exportable(program: Program) -> None:
    """Raise `ExportError` for a program without values, or one that draws random numbers."""
    _require_values(program)
    _require_deterministic(program)


def require_exportable_stages(plan: Staged[Program]) -> None:
    """Raise `ExportError` for a plan with such a program, before the first of its stages is exported."""
    for name, stage in plan.stages.items():
        try:
            require_exportable(stage.program)
        except ExportError as err:
            raise ExportError(f"stage '{name}': {err}") from err


def _require_values(program: Program) -> None:
    on_meta = [name for name, tensor in program.tensors().items() if tensor.is_meta]
    if on_meta:
        raise ExportError(
            f"{program.name} has {len(on_meta)} tensors without values (on the meta device), such as '{on_meta[0]}'; "
            "load the weights and capture again"
        )
    for spec, value in zip(program.inputs, program.example, strict=True):
        if isinstance(value, Tensor) and value.is_meta:
            raise ExportError(f"the example input '{spec.name}' has no values (meta device); capture with real inputs")


def _require_deterministic(program: Program) -> None:
    for node in program.nodes:
        if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            values = call_arguments(node)
            off = any(values.get(name) is False for name in ("train", "training"))
            if not off and values.get("dropout_p") != 0:
                raise ExportError(
                    f"{program.name} draws random numbers, so that no export can be compared with it; pass "
                    f"what it draws as an input, or capture it without\n  at {where(node)}"
                )


def call_arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call of an ATen operator by name, those left out with their default."""
    assert isinstance(node.target, OpOverload)
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def _replace_by_value(user: Node, node: Node, value: Any) -> None:
    user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda arg: value if arg is node else arg)


def _recorded(value: object) -> Any:
    return value.meta.get("val") if isinstance(value, Node) else value
