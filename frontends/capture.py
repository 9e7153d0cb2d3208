"""Capture: an ``nn.Module`` and example inputs become a `Program`, traced directly or through ``torch.export``."""

from __future__ import annotations

import inspect
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from ..graph.errors import CaptureError, first_line
from ..graph.guards import understood
from ..graph.interface import InputSpec
from ..graph.program import Program
from ..graph.signature import signature_of
from .branches import guards_of, without_idle
from .plain_graph import plain_graph
from .quick_trace import quick_trace

logger = logging.getLogger(__name__)

DYNAMIC = torch.export.Dim.DYNAMIC
DynamicDims = Mapping[str, Mapping[int, str]]

# torch's recurrent layers keep a list of their weights, which export replaces and restores. Matches no warning that
# names anything else.
_RESTORED_LISTS = r"The tensor attributes? (self\.(\w+\.)*_flat_weights\[\d+\](, )?)+ (was|were) assigned during export"

# A trace exchanges weights and functions of torch for its time, which threads share.
_TRACING = threading.RLock()

_FOREIGN_TYPE = re.compile(r"Found <class '([^']+)'> in output|Unsupported input type <class '([^']+)'>")


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: DynamicDims | None = None,
) -> Program:
    """Capture ``model`` in evaluation mode.

    Args:
        model: Any module. Weights may be on the ``meta`` device. It is never changed.
        args: Example positional inputs.
        kwargs: Example keyword inputs. Values that are not tensors become constants of the capture.
        dynamic: Names of dimensions that may vary, by input name: ``{"input_ids": {0: "batch", 1: "tokens"}}``.
            None makes dimension 0 of every tensor input dynamic whose size there equals that of the first
            tensor input: the batch. ``{}`` makes everything static.

    Returns:
        The captured computation. Its ``notes`` say what was decided, such as a batch that had to be static.

    Raises:
        CaptureError: ``model`` is no module, ``torch.export`` refused it (its message and the user's source line are kept),
            an input name in ``dynamic`` is unknown, a dynamic dimension has an example size below 2, or ``forward`` keeps a
            tensor where a capture cannot take it back.
    """
    _require_module(model)
    named = dict(kwargs or {})
    args = tuple(args)
    weights = next(iter(model.parameters()), None)
    if weights is not None and weights.is_meta:
        args, named = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, named))
    leaves, in_spec = pytree.tree_flatten((args, named))
    names = _leaf_names(model, args, named)
    labels = _dynamic_labels(names, leaves, dynamic)
    notes: list[str] = []
    by_default = dynamic is None and any(labels.values())
    if by_default and any(leaves[i].shape[0] < 2 for i, dims in labels.items() if dims):
        leaves = [_doubled(leaf) if labels.get(i) else leaf for i, leaf in enumerate(leaves)]
        args, named = pytree.tree_unflatten(leaves, in_spec)
        notes.append("the example batch was doubled to 2: an example batch of 1 would fix the batch size")
    try:
        with _labels_are_equal(model, names, labels):
            traced = _trace(model, leaves, in_spec, names, labels)
    except Exception as err:
        if not by_default:
            raise _capture_error(model, err) from err
        try:
            traced = _trace(model, leaves, in_spec, names, {})
        except Exception:
            raise _capture_error(model, err) from err
        labels = {}
        notes.append(f"the batch is static: {first_line(_capture_error(model, err))}")
        logger.warning("%s: %s", type(model).__name__, notes[-1])
    gm, out_spec, guards, detour = traced
    notes += [f"captured through torch.export, which takes longer: {detour}"] if detour else []
    notes += [f"not checked when it runs: {text}" for text in guards if not understood(text, names)]
    guards = [text for text in guards if understood(text, names)]
    guards = without_idle(
        guards, gm, names, leaves, labels, lambda larger: _trace(model, larger, in_spec, names, {}).graph_module
    )
    inputs = tuple(
        _input_spec(name, leaf, labels.get(i, {})) for i, (name, leaf) in enumerate(zip(names, leaves, strict=True))
    )
    name = type(model).__name__
    program = Program(gm, inputs, in_spec, out_spec, tuple(leaves), name, tuple(notes), tuple(guards))
    program.signature = signature_of(model.forward)
    program.own_state()
    return program


class _Traced(NamedTuple):
    graph_module: GraphModule
    out_spec: pytree.TreeSpec
    guards: list[str]
    detour: str  # why torch.export was needed for fixed sizes


def _trace(
    model: nn.Module, leaves: list[Any], in_spec: pytree.TreeSpec, names: list[str], labels: dict[int, dict[int, str]]
) -> _Traced:
    """Return the graph, in evaluation mode; that of fixed sizes without `torch.export`, if it can be had without."""
    # Writing the Python code of each intermediate graph is a fifth of the time; lazily, none is written.
    detour = ""
    with _TRACING, _evaluation(model), _use_lazy_graph_module(True):
        if not any(labels.values()):
            try:
                # Made of private parts of torch, which come and go between versions.
                from .direct_trace import direct_trace

                return _Traced(*direct_trace(model, leaves, in_spec, names), [], detour)
            except CaptureError:
                raise
            # Whatever stops it: what is a fault of the model, torch.export says better, and the rest is noted.
            except Exception as err:
                detour = first_line(err) or type(err).__name__
        exported = _export(model, leaves, in_spec, labels)
        guards = guards_of(model, exported, names)
        return _Traced(*plain_graph(exported), guards, detour)


def _export(
    model: nn.Module, leaves: list[Any], in_spec: pytree.TreeSpec, labels: dict[int, dict[int, str]]
) -> torch.export.ExportedProgram:
    # An alias for every leaf: export leaves marks on the tensors it is given, and takes one object for one input.
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, in_spec)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    marks = [{d: DYNAMIC for d in labels.get(i, {})} or None for i in range(len(leaves))]
    # `bound` holds the same leaves in the same order: positional first, then keywords in the caller's order.
    bound_leaves, bound_spec = pytree.tree_flatten(dict(bound))
    order = _match_leaves(bound_leaves, leaves)
    shapes = pytree.tree_unflatten([marks[i] for i in order], bound_spec)
    with quick_trace(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", _RESTORED_LISTS, UserWarning)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes if labels else None, strict=False)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in evaluation mode, and keep torch from logging each failing operator with its whole stack."""
    modes = [(m, m.training) for m in model.modules() if m.training]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True  # what went wrong is in the exception
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        log.disabled = silent
        for module, mode in modes:
            module.training = mode


@contextmanager
def _labels_are_equal(model: nn.Module, names: list[str], labels: dict[int, dict[int, str]]) -> Iterator[None]:
    """Tell the trace that dimensions of one label have one size, where no operator says so.

    Otherwise each has a symbol of its own, and a mask's batch divided by the sample's is no known number of heads.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for i, dims in labels.items():
        for dim, label in dims.items():
            places.setdefault(label, []).append((names[i], dim))
    if not places:  # nothing to compare, and a scripted module would refuse the hook
        yield
        return

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = dict(zip(_leaf_names(module, args, kwargs), pytree.tree_leaves((args, kwargs)), strict=True))
        for (first, dim), *others in places.values():
            for name, other in others:
                torch._check(values[name].shape[other] == values[first].shape[dim])

    hook = model.register_forward_pre_hook(check, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _match_leaves(bound: list[Any], leaves: list[Any]) -> list[int]:
    free = list(range(len(leaves)))
    order = []
    for leaf in bound:
        index = next(i for i in free if leaves[i] is leaf)
        free.remove(index)
        order.append(index)
    return order


def _leaf_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    try:
        positional = list(inspect.signature(model.forward).bind_partial(*args).arguments)
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as err:
        raise CaptureError(f"{type(model).__name__}.forward does not take the example inputs: {err}") from err
    parameters = inspect.signature(model.forward).parameters
    if any(parameters[p].kind is inspect.Parameter.VAR_POSITIONAL for p in positional):
        positional = [f"arg{i}" for i in range(len(args))]
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    names = []
    for path, _leaf in paths:
        side, first, *rest = cast(Any, path)
        head = positional[first.idx] if side.idx == 0 else str(first.key)
        names.append(".".join([head, *(str(getattr(key, "key", getattr(key, "idx", key))) for key in rest)]))
    return names


def _dynamic_labels(names: list[str], leaves: list[Any], dynamic: DynamicDims | None) -> dict[int, dict[int, str]]:
    if dynamic is None:
        tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            return {}
        batch = tensors[0][1].shape[0]
        return {i: {0: "batch"} for i, leaf in tensors if leaf.shape[0] == batch}
    labels: dict[int, dict[int, str]] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for name, dims in dynamic.items():
        if name not in names:
            raise CaptureError(f"dynamic names the input '{name}'; the inputs are {names}")
        index = names.index(name)
        leaf = leaves[index]
        if not isinstance(leaf, Tensor):
            raise CaptureError(f"dynamic names the input '{name}', which is not a tensor but {leaf!r}")
        labels[index] = {}
        for dim, label in (dims or {}).items():
            if not -leaf.dim() <= dim < leaf.dim():
                raise CaptureError(f"dynamic names dimension {dim} of '{name}', which has {leaf.dim()} dimensions")
            if leaf.shape[dim] < 2:
                raise CaptureError(
                    f"dimension {dim} of '{name}' is dynamic but its example size is {leaf.shape[dim]}; "
                    "give an example of size 2 or more, since sizes 0 and 1 are special to torch.export"
                )
            # torch.export's own marker is accepted in place of a name.
            label = label if isinstance(label, str) else f"{name}_{dim}"
            size, where = sizes.setdefault(label, (leaf.shape[dim], f"dimension {dim} of '{name}'"))
            if leaf.shape[dim] != size:
                raise CaptureError(
                    f"dynamic gives dimension {dim} of '{name}' and {where} one name, '{label}', but their example sizes "
                    f"are {leaf.shape[dim]} and {size}; give examples of one size, or two names"
                )
            labels[index][dim % leaf.dim()] = label
    return labels


def _doubled(leaf: Tensor) -> Tensor:
    return torch.cat([leaf, leaf]) if leaf.shape[0] == 1 else leaf


def _input_spec(name: str, leaf: Any, dims: Mapping[int, str]) -> InputSpec:
    if not isinstance(leaf, Tensor):
        return InputSpec(name, constant=leaf)
    return InputSpec(name, leaf.dtype, tuple(dims.get(d, size) for d, size in enumerate(leaf.shape)))


def _require_module(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise CaptureError(f"capture takes an instance of {model.__name__}, got the class; build it first")
    advice = "; give a module whose forward calls it" if callable(model) else ""
    name = getattr(model, "__name__", "")
    raise CaptureError(f"capture takes an nn.Module, got {type(model).__name__}{f' {name!r}' * bool(name)}{advice}")


def _capture_error(model: nn.Module, err: Exception) -> CaptureError:
    if isinstance(err, CaptureError):
        return err
    message = str(err)
    if foreign := _FOREIGN_TYPE.search(message):
        side = "returns" if foreign[1] else "is given"
        name = (foreign[1] or foreign[2]).rpartition(".")[2]
        return CaptureError(
            f"{type(model).__name__}.forward {side} an object of type {name}, which torch.export cannot take apart: use a "
            f"tuple or a dict, or, if it is a dataclass, call torch.export.register_dataclass({name}) before capture"
        )
    if "onstraint" in message or "Dim.DYNAMIC" in message:
        advice = "make the dimensions it names static: leave them out of capture(dynamic=...)"
    elif "DataDependent" in type(err).__name__ or "data-dependent" in message:
        advice = "the forward branches on the values of a tensor; pass such flags as Python constants"
    elif "DynamicCache" in message or "Cache" in message:
        advice = "pass use_cache=False (or set it in the model's config): caches are not captured"
    elif "tree_name" in message:
        message = "it cannot make a dimension dynamic beside an input that forward takes through **kwargs"
        advice = "drop that input (set it in the model's config), or capture with dynamic={}"
    else:
        advice = "run torch.export.export(model, args, kwargs, strict=False) for the full report"
    return CaptureError(f"torch.export could not capture {type(model).__name__}: {message.strip()}\n{advice}")
