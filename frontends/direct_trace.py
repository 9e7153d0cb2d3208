"""Trace a module of fixed sizes without `torch.export`: the same graph in a fraction of the time.

``torch.export`` follows symbols, proxies and subclasses of tensors through some seventy Python frames an operator. Where no
size is a symbol little of that is needed: the module runs once on fake tensors, and a mode above torch's composite
operators writes down each operator as it comes. What this does not follow (control flow, values that are read, tensors
that come from elsewhere, attributes that ``forward`` sets) raises `NotDirect`, and the caller exports instead.
"""

from __future__ import annotations

import gc
import operator
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context, _fakify_params_buffers
from torch._functorch import config as functorch_config
from torch._ops import OpOverload, _pop_mode_from_pre_dispatch, _set_mode_pre_dispatch
from torch._subclasses.fake_impls import fast_detach
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.export._trace import _ignore_backend_decomps
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import BaseTorchFunctionMode

from ..graph.errors import CaptureError
from ..graph.program import make_graph_module, register
from .kept_state import state_kept
from .named_tensors import named_tensors
from .origins import SourceLines, modules_entered
from .plain_graph import drop_checks, name_inputs

_ATEN = torch.ops.aten
# Ask about a tensor and make none.
_QUERIES = frozenset(
    (_ATEN.size, _ATEN.sym_size, _ATEN.stride, _ATEN.sym_stride, _ATEN.sym_numel, _ATEN.numel, torch.ops.prim.device)
)
# Read values. Those whose result has a size that depends on values raise on fake tensors.
_READERS = frozenset((_ATEN.item, _ATEN.is_nonzero, _ATEN._local_scalar_dense, _ATEN.equal))


# What an argument of an operator may be besides tensors, lists and None.
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


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
        CaptureError: It keeps a tensor of the trace where nothing can take it back, such as a cache of a function.
    """
    named = named_tensors(model)
    if any(type(t) not in (nn.Parameter, Tensor) for t in (*named.values(), *filter(_is_tensor, leaves))):
        raise NotDirect("a tensor of a class of its own")
    _require_plain(leaves)
    # Whoever asks for the memory of a fake tensor is refused, not given what happens to lie there.
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
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
        state_kept(model),
        _reparametrize_module(model, fake, tie_weights=True, strict=True, stack_weights=True),
        state_kept(model) as new,
        recorder.recording(model),
    ):
        result = model(*args, **kwargs)
    weights = set(map(id, fake.values()))
    if any(_is_tensor(leaf) and id(leaf) not in weights for leaf in pytree.tree_leaves(new)):
        raise NotDirect("forward keeps a tensor in an attribute")
    flat, out_spec = pytree.tree_flatten(result)
    _require_plain(flat)
    gm = recorder.finish(model, flat)
    del result, flat
    recorder.require_none_kept()
    return gm, out_spec


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
        # Fake tensors that operators get in the place of real ones, by the id of these.
        self.fakes: dict[int, Tensor] = {}
        self.constants: set[str] = set()
        self.inputs: list[Any] = []
        self.first_input: Node | None = None
        self.failed: BaseException | None = None

    def attribute(self, name: str, tensor: Tensor, fake: Any) -> Node:
        """Return a node that reads a tensor of the module, a parameter, a buffer or a constant."""
        node = self.graph.create_node("get_attr", name)
        # What operators in place make of its shape is not what it is at the beginning.
        node.meta["val"] = fast_detach(self.mode, fake)
        self.state[name] = tensor
        self.fakes[id(tensor)] = fake
        # The module's own tensor too: recurrent layers keep a list of their weights.
        for seen in (fake, tensor):
            self._bind(seen, node)
        return node

    def placeholder(self, name: str, leaf: Any) -> None:
        """Add an input."""
        node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["val"] = fast_detach(self.mode, leaf) if _is_tensor(leaf) else leaf
        self.first_input = self.first_input or node
        self.inputs.append(leaf)
        if isinstance(leaf, Tensor):
            self._bind(leaf, node)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Write down the operators that are called, and in which modules."""
        with (
            _compiling_state_context(),
            _ignore_backend_decomps(),
            enable_python_dispatcher(),
            modules_entered(model, self.entered),
            # As under torch.export: layers take no fused path (`nn.TransformerEncoderLayer`) where a mode looks on.
            BaseTorchFunctionMode(),
            torch.set_grad_enabled(torch.is_grad_enabled()),  # which forward may change for good
            self.mode,
        ):
            _set_mode_pre_dispatch(self)
            try:
                yield
            finally:
                _pop_mode_from_pre_dispatch()

    def finish(self, model: nn.Module, results: Sequence[Any]) -> GraphModule:
        """Return the graph with what it reads."""
        if self.failed is not None:
            raise NotDirect("forward went on after an operator had failed") from self.failed
        self.graph.output(tuple(self._argument(value) for value in results))
        for node in reversed(self.graph.nodes):
            if not node.users and node.target in (_ATEN.detach.default, operator.getitem):
                self.graph.erase_node(node)
        drop_checks(self.graph)
        name_inputs(self.graph)
        modules = model.named_modules(remove_duplicate=False)
        passing = {f"{path}.{name}".lstrip(".") for path, m in modules for name in m._non_persistent_buffers_set}
        root = nn.Module()
        for node in self.graph.find_nodes(op="get_attr"):
            register(root, node.target, self.state[node.target], persistent=node.target not in passing)
        return make_graph_module(root, self.graph)

    def require_none_kept(self) -> None:
        """Refuse a module that leaves tensors of the trace behind: what finds them later computes nothing.

        Raises:
            CaptureError: Says where the first was made.
        """
        own = {*map(id, self.inputs), *map(id, self.fakes.values()), *self.fakes}
        if not self._kept(own):
            return
        gc.collect()  # what only a cycle holds is nobody's
        kept = self._kept(own)
        if kept:
            node = kept[0]
            raise CaptureError(
                f"forward keeps a tensor outside of its modules, in a cache of a function or a global variable, where a capture "
                f"would leave a tensor without values; it is the result of {node.target} at\n{node.meta['stack_trace']}\n"
                "keep it in a buffer, or make it anew in each call"
            )

    def _kept(self, own: set[int]) -> list[Node]:
        return [node for key, (ref, node) in self.known.items() if key not in own and ref() is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._record(func, args, kwargs or {})
        # Remembered, since the model's own code may catch it and go another way.
        except BaseException as err:
            self.failed = err
            raise

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(func, OpOverload) or func.overloadpacket in _READERS:
            raise NotDirect(f"{func} reads values")
        if func.overloadpacket in _QUERIES:
            return func(*args, **kwargs)
        if torch._C._is_any_autocast_enabled():
            raise NotDirect("autocast is on")
        if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
            raise NotDirect("a transform of functions is on")
        node_args = tuple([self._argument(value) for value in args])
        node_kwargs = {key: self._argument(value) for key, value in kwargs.items()}
        target = func
        if func is _ATEN.lift_fresh.default:
            # What is lifted is fresh, which a constant that is read is not.
            target = _ATEN.lift_fresh_copy.default
        else:
            args = [self._fake(value) for value in args]
            kwargs = {key: self._fake(value) for key, value in kwargs.items()}
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
        if value is not None and not isinstance(value, _PLAIN):
            raise NotDirect(f"an argument of type {type(value).__name__}")
        return value

    def _fake(self, value: Any) -> Any:
        """Return what an operator gets: never a real tensor, which an operator in place would write into."""
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return self.fakes[id(value)]
        if isinstance(value, (list, tuple)):
            return [self._fake(part) for part in value]
        return value

    def _constant(self, tensor: Tensor) -> Node:
        if type(tensor) is not Tensor:
            raise NotDirect("a tensor that no operator gave")
        # Named as torch.export does: an attribute by its name, others after the module that reads it first.
        path = list(self.entered.values())[-1][0] if self.entered else ""
        name = self.attributes.get(id(tensor)) or self._free(f"{path}.lifted_tensor_".lstrip("."))
        self.constants.add(name)
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        with self.graph.inserting_before(self.first_input):
            return self.attribute(name, tensor, fake)

    def _free(self, prefix: str) -> str:
        taken = {*self.state, *self.attributes.values()}
        return next(name for i in count(len(self.constants)) if (name := f"{prefix}{i}") not in taken)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


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
