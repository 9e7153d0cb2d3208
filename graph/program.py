"""`Program`: one captured computation, flat inside and of the caller's signature outside."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .errors import PreconditionError
from .guards import prepare
from .interface import Evaluable, InputSpec
from .names import GroupName
from .signature import Signature
from .writes import owned, written


@dataclass
class Program(Evaluable):
    """A captured computation.

    The graph takes the flattened inputs and returns the flattened outputs; `__call__` has the signature
    of the module that was captured. Parameters and buffers are ``get_attr`` nodes whose targets are the
    model's own fully qualified names, and every node has its shape and dtype in ``meta["val"]``.

    Attributes:
        graph_module: The graph and the tensors it owns. Tensors are values: rewrites rebind them and never
            write into them, since the caller's module shares their storage.
        inputs: One entry per graph placeholder.
        in_spec: Tree of ``(args, kwargs)``.
        out_spec: Tree of the result.
        example: The inputs of the capture, flattened; on the ``meta`` device when the model was.
        name: Class name of the captured module.
        notes: What capture decided that the caller may want to know, one sentence each.
        guards: Conditions on the sizes of inputs under which the code takes the branches that were captured, in the
            form of `graphwright.graph.guards`; checked at every call.
        group_names: What removals noted so that coupling groups keep their names.
        signature: Of the captured module's ``forward``: inputs may be passed by position or by name, and those that
            were left at their defaults may be given again. Without one, inputs are passed as they were captured.
    """

    graph_module: GraphModule
    inputs: tuple[InputSpec, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: tuple[Any, ...]
    name: str = "Program"
    notes: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    group_names: tuple[GroupName, ...] = ()
    signature: Signature = ()
    version: int = field(default=0, compare=False)

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """Run on inputs as `flatten` returns them; see `Evaluable`.

        Raises:
            PreconditionError: The program has no weights, only their shapes, and the inputs have values.
        """
        try:
            flat = self.graph_module(*leaves)
        except RuntimeError as err:
            self._check_device(leaves, err)
            raise
        return self.unflatten(flat)

    @property
    def nodes(self) -> Iterator[Node]:
        """The graph's nodes in topological order."""
        return iter(self.graph_module.graph.nodes)

    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the ``(args, kwargs)`` of the capture."""
        return pytree.tree_unflatten(list(self.example), self.in_spec)

    def tensors(self) -> dict[str, Tensor]:
        """Return every parameter and buffer that the graph reads, by name. Tied names share one tensor."""
        out: dict[str, Tensor] = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "get_attr" and node.target not in out:
                value = get_tensor(self.graph_module, node.target)
                if value is not None:
                    out[node.target] = value
        return out

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the graph reads, by name, tied names included."""
        return {k: v for k, v in self.tensors().items() if isinstance(v, nn.Parameter)}

    def copy(self) -> Program:
        """Return a program that can be rewritten and run on its own.

        Tensors are shared, as values, except those that the graph itself writes into when it runs (statistics, counters).
        """
        copied = replace(self, graph_module=copy_graph_module(self.graph_module))
        copied.own_state()
        return copied

    def own_state(self) -> None:
        """Put copies in the place of the tensors that the graph writes into when it runs."""
        names = written(self.graph_module.graph)
        for name, tensor in owned(names, self.tensors() if names else {}).items():
            set_tensor(self.graph_module, name, tensor)

    def module(self, flat: bool = False) -> nn.Module:
        """Return an ``nn.Module`` with the original's call signature and parameter names; for ``flat`` see `Evaluable`."""
        return FlatModule(self) if flat else ProgramModule(self)

    def changed(self) -> None:
        """Recompile after a rewrite and drop what was cached for the graph before it; `verify` checks the result."""
        self.graph_module.recompile()
        self.version += 1

    def _check_device(self, leaves: Sequence[Any], err: RuntimeError) -> None:
        weightless = next((name for name, tensor in self.tensors().items() if tensor.is_meta), None)
        if weightless is not None and any(isinstance(v, Tensor) and not v.is_meta for v in leaves):
            raise PreconditionError(
                f"{self.name} cannot compute: '{weightless}' is on the meta device, a shape without values; capture the "
                "model with its weights, or give inputs on the meta device to get shapes"
            ) from err


class ProgramModule(nn.Module):
    """A Program as a module. It shares the program's tensors and has their original names."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        gm = program.graph_module
        # The registries themselves are shared, so that `.to()` and optimisers act on what the graph reads.
        self._parameters, self._buffers, self._modules = gm._parameters, gm._buffers, gm._modules
        object.__setattr__(self, "program", program)
        self.training = False
        prepare(program.guards)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program: Program = self.__dict__["program"]
        return program(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"captured from {self.__dict__['program'].name}"


class FlatModule(ProgramModule):
    """A Program as a module that takes what `Program.flatten` returned, and checks nothing."""

    def forward(self, *leaves: Any) -> Any:
        program: Program = self.__dict__["program"]
        return program.evaluate(leaves)


def tensor_identity(tensor: Tensor) -> Hashable:
    """Return what two names of one tensor have in common: the elements in memory and how they are read.

    Two `nn.Parameter` objects over one storage are one tensor, with one shape, strides and dtype. Where there is no
    memory to compare (``meta``, no elements, sparse) it is the object that counts, as long as it lives.
    """
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return id(tensor)
    storage = tensor.untyped_storage().data_ptr()
    if not storage:
        return id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj()


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors without repetitions, each the first of those with its `tensor_identity`."""
    found: dict[Hashable, Tensor] = {}
    for tensor in tensors:
        found.setdefault(tensor_identity(tensor), tensor)
    return list(found.values())


def get_tensor(gm: GraphModule, target: str) -> Tensor | None:
    """Return the parameter, buffer or constant named ``target``; None when it is not a tensor."""
    owner: Any = gm
    *path, name = target.split(".")
    for part in path:
        # The registries first: `getattr` of a module comes to them only after its own lookup has failed.
        owner = owner._modules.get(part) or getattr(owner, part)
    value = owner._parameters.get(name)
    value = owner._buffers.get(name) if value is None else value
    value = getattr(owner, name) if value is None else value
    return value if isinstance(value, Tensor) else None


def set_tensor(gm: GraphModule, target: str, value: Tensor) -> None:
    """Rebind the parameter, buffer or constant named ``target``. The old tensor is left as it is."""
    *path, name = target.split(".")
    owner: nn.Module = gm
    for part in path:
        owner = owner._modules[part]  # type: ignore[assignment]
    for registry in (owner._parameters, owner._buffers):
        if name in registry:
            registry[name] = value  # type: ignore[assignment]
            return
    setattr(owner, name, value)


def register(root: nn.Module, name: str, value: Any, persistent: bool) -> None:
    """Give ``root`` a parameter, a buffer or a constant of a dotted name."""
    owner = root
    *path, leaf = name.split(".")
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        owner.register_buffer(leaf, value, persistent)
    else:
        setattr(owner, leaf, value)


def copy_graph_module(gm: GraphModule) -> GraphModule:
    """Copy graph and module tree; tensors are shared by reference, node ``meta`` one level deep."""
    graph = torch.fx.Graph()
    env: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, env)
    output = next(iter(reversed(gm.graph.nodes)))
    graph.output(result)
    next(iter(reversed(graph.nodes))).meta = dict(output.meta)
    return make_graph_module(gm, graph, type(gm).__name__)


def make_graph_module(root: nn.Module, graph: torch.fx.Graph, class_name: str = "GraphModule") -> GraphModule:
    """Return a `GraphModule` that runs ``graph`` on the tensors of ``root``; buffers that are not persistent stay so."""
    made = GraphModule(root, graph, class_name=class_name)
    # GraphModule copies referenced attributes only and forgets which buffers are not persistent.
    # It also leaves out modules of which the graph reads nothing.
    modules = dict(made.named_modules())
    for name, module in root.named_modules():
        if name in modules:
            modules[name]._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return made
