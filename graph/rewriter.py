"""`Rewriter`: the one place that makes nodes, and gives each of them a shape, an origin and the rule's name.

rw = Rewriter(program, "mul-sigmoid-to-silu")
rw.replace(product, rw.call(aten.silu.default, x, origin=product))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node, map_arg

from .cost import example_shape
from .errors import PreconditionError
from .interface import InputSpec
from .program import Program
from .verify import fake_mode, fake_tensor

# What a node takes over from the node it stands for: the modules and the source lines it comes from.
ORIGIN = ("nn_module_stack", "stack_trace")
# Key of `Node.meta`: the name of the rule or pass that made the node.
REWRITTEN_BY = "rewritten_by"


@dataclass(frozen=True)
class Rewriter:
    """Changes the graph of ``program`` in the name of ``rule``. The pass protocol recompiles and verifies afterwards."""

    program: Program
    rule: str

    def call(self, target: Callable[..., Any], *args: Any, origin: Node, **kwargs: Any) -> Node:
        """Insert a call before ``origin``, whose place it takes or which will read it.

        Raises:
            RuntimeError, TypeError: The operator does not accept the shapes of its operands.
        """
        with fake_mode(self.program.graph_module), torch.no_grad():
            value = target(*map_arg(args, _value), **map_arg(kwargs, _value))
        with origin.graph.inserting_before(origin):
            return self._mark(origin.graph.call_function(target, args, kwargs), value, origin)

    def tensor(self, name: str, tensor: Tensor, origin: Node) -> Node:
        """Register ``tensor`` (a parameter or a constant) under a new qualified name and insert its read.

        Raises:
            PreconditionError: The name is taken.
        """
        gm = self.program.graph_module
        path, _, leaf = name.rpartition(".")
        owner = gm.get_submodule(path)
        if hasattr(owner, leaf):
            raise PreconditionError(f"{self.rule} cannot add the tensor '{name}': the name is taken; choose another")
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
        with gm.graph.inserting_before(origin):
            return self._mark(gm.graph.get_attr(name), fake_tensor(fake_mode(gm), tensor), origin)

    def placeholder(self, name: str, example: Tensor, shape: Sequence[int | str] | None = None) -> Node:
        """Add an input, which callers pass by ``name``, after those there are.

        Args:
            name: Of the keyword argument.
            example: Its example value.
            shape: As in `InputSpec`: labels that other inputs have too for dynamic dimensions; by default all static.

        Raises:
            PreconditionError: The name is taken, or no input has one of the labels.
        """
        shape = tuple(example.shape) if shape is None else tuple(shape)
        sizes = [self._size(label) if isinstance(label, str) else label for label in shape]
        return self._input(name, example, shape, fake_tensor(fake_mode(self.program.graph_module), example, sizes))

    def placeholder_like(self, name: str, like: Node) -> Node:
        """Add an input for values that ``like`` gives in a run of this program, with its dynamic dimensions.

        The example is drawn from a normal distribution. A dimension of a size that no input has, such as half of a
        dynamic height, is a dynamic dimension of its own: ``<name>_<dimension>``.

        Raises:
            PreconditionError: The name is taken.
        """
        value = like.meta["val"]
        labels = {str(self._size(d)): d for spec in self.program.inputs for d in spec.shape if isinstance(d, str)}
        shape = tuple(
            size if isinstance(size, int) else labels.get(str(size), f"{name}_{d}")
            for d, size in enumerate(value.shape)
        )
        device = next((leaf.device for leaf in self.program.example if isinstance(leaf, Tensor)), value.device)
        example = torch.empty(example_shape(value), dtype=value.dtype, device=device)
        if not example.is_meta:
            example = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
        return self._input(name, example, shape, value)

    def _input(self, name: str, example: Tensor, shape: tuple[int | str, ...], value: Any) -> Node:
        program, graph = self.program, self.program.graph_module.graph
        if not name.isidentifier() or any(name == spec.name.partition(".")[0] for spec in program.inputs):
            raise PreconditionError(
                f"{self.rule} cannot add the input '{name}': it is taken or no name; choose another"
            )
        old = graph.find_nodes(op="placeholder")
        after = old[-1] if old else None
        with graph.inserting_after(after) if after else graph.inserting_before(next(iter(graph.nodes))):
            node = self._mark(graph.placeholder(name), value)
        args, kwargs = program.in_spec.children()
        keys = [*(kwargs.context or ()), name]
        keywords = pytree.TreeSpec(dict, keys, [*kwargs.children(), pytree.tree_structure(0)])
        program.in_spec = pytree.TreeSpec(tuple, None, [args, keywords])
        program.inputs = (*program.inputs, InputSpec(name, example.dtype, shape))
        program.example = (*program.example, example)
        return node

    def outputs(self, nodes: Mapping[str, Node]) -> None:
        """Add results: the program then returns ``(what it returned, {name: tensor})``."""
        output = next(iter(reversed(self.program.graph_module.graph.nodes)))
        output.args = ((*output.args[0], *nodes.values()),)  # type: ignore[misc] (FX arguments have any type)
        if isinstance(output.meta.get("val"), (tuple, list)):
            output.meta["val"] = (*output.meta["val"], *map(_value, nodes.values()))
        added = pytree.tree_structure(dict.fromkeys(nodes, 0))
        self.program.out_spec = pytree.TreeSpec(tuple, None, [self.program.out_spec, added])

    def replace(self, old: Node, new: Node) -> None:
        """Let every user of ``old`` read ``new``, and erase what only ``old`` needed."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.erase_dead(old)

    def erase_dead(self, *nodes: Node) -> int:
        """Erase those of ``nodes`` that nobody reads, then what only they read; return how many. Inputs stay."""
        work, erased = list(nodes), 0
        while work:
            node = work.pop()
            if node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            erased += 1
            work.extend(sources)
        return erased

    def _mark(self, node: Node, value: Any, origin: Node | None = None) -> Node:
        node.meta.update({key: origin.meta[key] for key in ORIGIN if origin is not None and key in origin.meta})
        node.meta.update({"val": value, REWRITTEN_BY: self.rule})
        return node

    def _size(self, label: str) -> Any:
        placeholders = self.program.graph_module.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, self.program.inputs, strict=True):
            if label in spec.shape:
                return node.meta["val"].shape[spec.shape.index(label)]
        raise PreconditionError(f"no input of {self.program.name} has a dynamic dimension '{label}'; give its size")


def _value(node: Node) -> Any:
    return node.meta["val"]


__all__ = ["ORIGIN", "REWRITTEN_BY", "Rewriter"]
