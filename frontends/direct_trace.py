"""Trace a module of fixed sizes without `torch.export`: the same graph in a fraction of the time.

``torch.export`` follows symbols, proxies and subclasses of tensors through some seventy Python frames an operator. Where no
size is a symbol little of that is needed: the module runs once on fake tensors, and a mode above torch's composite
operators writes down each operator as it comes. What this does not follow (control flow, values that are read, tensors
that come from elsewhere, attributes that ``forward`` sets) raises `NotDirect`, and the caller exports instead.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context, _fakify_params_buffers
from torch._ops import OpOverload, _pop_mode_from_pre_dispatch, _set_mode_pre_dispatch
from torch._subclasses.fake_impls import fast_detach
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export._trace import _ignore_backend_decomps
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.nn.utils.stateless import _reparametrize_module

from ..graph.program import graph_module, register
from .named_tensors import named_tensors
from .source_lines import SourceLines

_ATEN = torch.ops.aten
# Ask about a tensor and make none.
_QUERIES = frozenset(
    (_ATEN.size, _ATEN.sym_size, _ATEN.stride, _ATEN.sym_stride, _ATEN.sym_numel, _ATEN.numel, torch.ops.prim.device)
)
# Read values. Those whose result has a size that depends on values raise on fake tensors.
_READERS = frozenset((_ATEN.item, _ATEN.is_nonzero, _ATEN._local_scalar_dense, _ATEN.equal))


class NotDirect(Exception):
    """The module does something that only `torch.export` follows."""


def direct_trace(
    model: nn.Module, leaves: Sequence[Any], in_spec: pytree.TreeSpec, names: Sequence[str]
) -> tuple[GraphModule, pytree.TreeSpec]:
    """Return the graph of ``model`` for these inputs, which returns a flat tuple, and the structure of its result.

    Args:
        model: In evaluation mode.
        leaves: Example inputs, flattened.
        in_spec: Tree of ``(args, kwargs)``.
        names: Of the inputs.

    Raises:
        NotDirect: The module does what this does not follow; it is as it was.
    """
    named = named_tensors(model)
    if any(type(t) not in (nn.Parameter, Tensor) for t in (*named.values(), *filter(_is_tensor, leaves))):
        raise NotDirect("a tensor of a class of its own")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = _fakify_params_buffers(mode, model)
        inputs = [mode.from_tensor(leaf.detach(), static_shapes=True) if _is_tensor(leaf) else leaf for leaf in leaves]
    recorder = _Recorder(mode)
    for name, tensor in fake.items():
        recorder.attribute(name, named[name], tensor)
    for name, leaf in zip(names, inputs, strict=True):
        recorder.placeholder(name, leaf)
    args, kwargs = pytree.tree_unflatten(inputs, in_spec)
    with (
        _attributes_kept(model),
        _reparametrize_module(model, fake, tie_weights=True, strict=True, stack_weights=True),
        recorder.recording(model),
    ):
        result = model(*args, **kwargs)
    flat, out_spec = pytree.tree_flatten(result)
    return recorder.finish(model, flat), out_spec


class _Recorder(ProxyTorchDispatchMode):
    """Writes down the operators that are called; of torch's class, since torch lets no other stand at this place."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__(PythonKeyTracer(), "fake", pre_dispatch=True)
        self.mode = mode
        self.graph = Graph()
        self.lines = SourceLines()
        self.entered: dict[str, tuple[str, str]] = {}
        # By id. References are weak: torch gives a result of its own factories to the caller as it is only while nobody
        # else holds it, and else a copy that no operator gave.
        self.known: dict[int, tuple[weakref.ref[Tensor], Node]] = {}
        self.state: dict[str, Tensor] = {}
        self.constants: set[str] = set()
        self.first_input: Node | None = None

    def attribute(self, name: str, tensor: Tensor, fake: Any) -> Node:
        """Return a node that reads a tensor of the module, a parameter, a buffer or a constant."""
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = fake
        self.state[name] = tensor
        # The module's own tensor too: recurrent layers keep a list of their weights.
        for seen in (fake, tensor):
            if self._node_of(seen) is None:
                self._bind(seen, node)
        return node

    def placeholder(self, name: str, leaf: Any) -> None:
        """Add an input."""
        node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["val"] = leaf
        self.first_input = self.first_input or node
        if isinstance(leaf, Tensor):
            self._bind(leaf, node)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Write down the operators that are called, and in which modules."""
        with (
            _compiling_state_context(),
            _ignore_backend_decomps(),
            torch._dispatch.python.enable_python_dispatcher(),
            _modules_entered(model, self.entered),
            self.mode,
        ):
            _set_mode_pre_dispatch(self)
            try:
                yield
            finally:
                _pop_mode_from_pre_dispatch()

    def finish(self, model: nn.Module, results: Sequence[Any]) -> GraphModule:
        """Return the graph with what it reads."""
        self.graph.output(tuple(self._argument(value) for value in results))
        for node in reversed(self.graph.nodes):
            if not node.users and node.target is _ATEN.detach.default:
                self.graph.erase_node(node)
        kept = self.constants | set(model.state_dict())
        root = nn.Module()
        for node in self.graph.find_nodes(op="get_attr"):
            register(root, node.target, self.state[node.target], persistent=node.target in kept)
        return graph_module(root, self.graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or func.overloadpacket in _READERS:
            raise NotDirect(f"{func} reads values")
        if func.overloadpacket in _QUERIES:
            return func(*args, **kwargs)
        if torch._C._is_any_autocast_enabled():
            raise NotDirect("autocast is on")
        node_args = tuple([self._argument(value) for value in args])
        node_kwargs = {key: self._argument(value) for key, value in kwargs.items()}
        # What is lifted is fresh, which a constant that is read is not.
        target = _ATEN.lift_fresh_copy.default if func is _ATEN.lift_fresh.default else func
        out = func(*args, **kwargs)
        name = self.graph._target_to_str(target.overloadpacket.__name__)
        node = self.graph.create_node("call_function", target, node_args, node_kwargs, name)
        node.meta["nn_module_stack"] = dict(self.entered)
        node.meta["stack_trace"] = self.lines.text()
        self._results(node, out)
        return out

    def _results(self, node: Node, out: Any) -> None:
        if isinstance(out, FakeTensor):
            node.meta["val"] = fast_detach(self.mode, out)
            self._bind(out, node)
        elif isinstance(out, (tuple, list)) and all(isinstance(part, FakeTensor) for part in out):
            node.meta["val"] = type(out)([fast_detach(self.mode, part) for part in out])
            for i, part in enumerate(out):
                item = self.graph.create_node("call_function", operator.getitem, (node, i))
                item.meta = {**node.meta, "val": node.meta["val"][i]}
                self._bind(part, item)
        elif out is None:
            node.meta["val"] = None
        else:
            raise NotDirect(f"{node.target} returns {type(out).__name__}")

    def _bind(self, tensor: Tensor, node: Node) -> None:
        self.known[id(tensor)] = weakref.ref(tensor), node

    def _node_of(self, tensor: Tensor) -> Node | None:
        reference, node = self.known.get(id(tensor), (None, None))
        return node if reference is not None and reference() is tensor else None

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node_of(value) or self._constant(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(part) for part in value]
        return value

    def _constant(self, tensor: Tensor) -> Node:
        if type(tensor) is not Tensor:
            raise NotDirect("a tensor that no operator gave")
        name = f"lifted_tensor_{len(self.constants)}"
        self.constants.add(name)
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        assert self.first_input is not None
        with self.graph.inserting_before(self.first_input):
            return self.attribute(name, tensor, fake)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def _modules_entered(model: nn.Module, entered: dict[str, tuple[str, str]]) -> Iterator[None]:
    """Keep in ``entered`` the modules that are running, outermost first, as `torch.export` names them."""
    known: dict[nn.Module, tuple[str, str]] = {}
    calls: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        kind = type(module)
        known[module] = name, f"{kind.__module__}.{kind.__qualname__}"
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self not in known:
            return original(self, *args, **kwargs)
        again = calls[self] = calls.get(self, -1) + 1
        key = f"L__self__{known[self][0]}" + f"@{again}" * bool(again)
        entered[key] = known[self]
        try:
            return original(self, *args, **kwargs)
        finally:
            del entered[key]

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = original


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put attributes of the modules back as they were.

    Raises:
        NotDirect: There was something to put back.
    """
    before = [(module, {key: (value, _contents(value)) for key, value in vars(module).items()}) for module in model.modules()]
    try:
        yield
    finally:
        changed = [name for module, attributes in before for name in _restored(module, attributes)]
    if changed:
        raise NotDirect(f"forward sets {changed[0]}")


def _contents(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else None


def _restored(module: nn.Module, before: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Put back what changed; return its names."""
    now, changed = vars(module), []
    for key in [key for key in now if key not in before]:
        changed.append(key)
        del now[key]
    for key, (value, contents) in before.items():
        if key not in now or now[key] is not value and not _same(now[key], contents):
            changed.append(key)
        if key not in now or now[key] is not value:
            now[key] = value
        if contents is not None and not _same(value, contents):
            changed.append(key)
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
    return changed


def _same(value: Any, contents: Any) -> bool:
    if type(value) is not type(contents) or len(value) != len(contents):
        return False
    if isinstance(value, dict):
        return list(value) == list(contents) and all(a is b for a, b in zip(value.values(), contents.values(), strict=True))
    return all(a is b for a, b in zip(value, contents, strict=True))
