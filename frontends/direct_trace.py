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
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context, _fakify_params_buffers
from torch._ops import OpOverload, _pop_mode_from_pre_dispatch, _set_mode_pre_dispatch
from torch._subclasses.fake_impls import fast_detach
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export._trace import _ignore_backend_decomps
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import BaseTorchFunctionMode

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
    _require_plain(leaves)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = _fakify_params_buffers(mode, model)
        inputs = [mode.from_tensor(leaf.detach(), static_shapes=True) if _is_tensor(leaf) else leaf for leaf in leaves]
    recorder = _Recorder(mode, _tensor_attributes(model))
    for name, tensor in fake.items():
        recorder.attribute(name, named[name], tensor)
    for name, leaf in zip(names, inputs, strict=True):
        recorder.placeholder(name, leaf)
    args, kwargs = pytree.tree_unflatten(inputs, in_spec)
    # Weights are exchanged inside of what is put back: recurrent layers keep lists of theirs.
    with (
        _attributes_kept(model),
        _reparametrize_module(model, fake, tie_weights=True, strict=True, stack_weights=True),
        _attributes_kept(model) as changed,
        recorder.recording(model),
    ):
        result = model(*args, **kwargs)
    weights = set(map(id, fake.values()))
    for key, value in changed:
        if any(_is_tensor(leaf) and id(leaf) not in weights for leaf in pytree.tree_leaves(value)):
            raise NotDirect(f"forward keeps a tensor in {key}")
    flat, out_spec = pytree.tree_flatten(result)
    _require_plain(flat)
    return recorder.finish(model, flat), out_spec


class _Recorder(ProxyTorchDispatchMode):
    """Writes down the operators that are called; of torch's class, since torch lets no other stand at this place."""

    def __init__(self, mode: FakeTensorMode, attributes: Mapping[int, str]) -> None:
        super().__init__(PythonKeyTracer(), "fake", pre_dispatch=True)
        self.mode = mode
        self.attributes = attributes
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
            enable_python_dispatcher(),
            _modules_entered(model, self.entered),
            # As under torch.export: layers take no fused path (`nn.TransformerEncoderLayer`) where a mode looks on.
            BaseTorchFunctionMode(),
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
            if not node.users and node.target in (_ATEN.detach.default, operator.getitem):
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
        # Named as torch.export does: an attribute by its name, others after the module that reads it first.
        path = list(self.entered.values())[-1][0] if self.entered else ""
        name = self.attributes.get(id(tensor)) or f"{path}.lifted_tensor_{len(self.constants)}".lstrip(".")
        self.constants.add(name)
        fake = self.mode.from_tensor(tensor, static_shapes=True)
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


def _tensor_attributes(model: nn.Module) -> dict[int, str]:
    """Return the names of the tensors that are neither parameters nor buffers, by id."""
    return {
        id(value): f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is Tensor
    }


def _require_plain(leaves: Sequence[Any]) -> None:
    """Leave the refusal of what no graph takes or returns to `torch.export`."""
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            raise NotDirect(f"an object of type {type(leaf).__name__}")


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """Put attributes of the modules back as they were; yield a list to which is added what had changed."""
    changed: list[tuple[str, Any]] = []
    before = [(m, {key: (value, _contents(value)) for key, value in vars(m).items()}) for m in model.modules()]
    try:
        yield changed
    finally:
        for module, attributes in before:
            changed += _restored(vars(module), attributes).items()


def _contents(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else None


def _restored(now: dict[str, Any], before: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Put back what changed; return what it had become."""
    changed = {key: now.pop(key) for key in list(now) if key not in before}
    for key, (value, contents) in before.items():
        if key not in now or now[key] is not value:
            changed[key] = now.get(key)
            now[key] = value
        if contents is not None and not _same(value, contents):
            changed[key] = value.copy()
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
    return changed


def _same(value: Any, contents: Any) -> bool:
    """Whether a container still holds the objects that it held."""
    if isinstance(value, dict):
        if list(value) != list(contents):
            return False
        value, contents = value.values(), contents.values()
    return len(value) == len(contents) and all(a is b for a, b in zip(value, contents, strict=True))
