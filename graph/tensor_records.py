"""The tensors that a program owns: which there are, which are tied, and how they hang in its module tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .encoding import decode
from .errors import ArtifactError
from .program import tensor_identity
from .values import describe

PARAMETER, BUFFER, CONSTANT = "parameter", "buffer", "constant"


def tensor_records(gm: GraphModule) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """List every tensor that the graphs of ``gm`` read.

    Returns:
        By name, a record of plain data (kind, shape, dtype, device, ``alias`` with the first name of a tied
        tensor); and by name the tensors that hold data, tied ones once and those on ``meta`` not at all.

    Raises:
        ArtifactError: A tensor is fake, sparse or of a class with a dispatch of its own.
    """
    records: dict[str, dict[str, Any]] = {}
    data: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    for name, owner, tensor in _owned(gm, ""):
        if name in records:
            continue
        if isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor):
            raise ArtifactError(
                f"'{name}' is a {type(tensor).__name__} and cannot be saved; capture the model with plain tensors"
            )
        records[name] = {**_role(owner, name.rpartition(".")[2]), **describe(tensor)}
        if tensor.requires_grad:
            records[name]["requires_grad"] = True
        known = first.setdefault(tensor_identity(tensor), name)
        if known != name:
            records[name]["alias"] = known
        elif not tensor.is_meta:
            data[name] = tensor
    return records, data


def restore_tensors(records: Mapping[str, Mapping[str, Any]], data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the tensors of `tensor_records` again; tied names share one tensor.

    Raises:
        ArtifactError: A tensor is missing, has another shape or dtype than recorded, or its device is not here.
    """
    out: dict[str, Tensor] = {}
    for name, record in records.items():
        alias = record.get("alias")
        if alias is None:
            out[name] = _as_kind(restore(f"'{name}'", record, data.get(name)), record)
        elif alias not in out:
            raise ArtifactError(f"'{name}' is tied to '{alias}', which is no tensor before it")
        else:
            same = records[alias]["kind"] == record["kind"] or PARAMETER not in (
                records[alias]["kind"],
                record["kind"],
            )
            out[name] = out[alias] if same else _as_kind(out[alias].detach(), record)
    return out


def restore(what: str, record: Mapping[str, Any], stored: Tensor | None) -> Tensor:
    """Return one tensor in memory of its own, with the dtype, strides and device that `describe` recorded."""
    dtype, device = decode({"dtype": record["dtype"]}), decode({"device": record["device"]})
    shape = list(record["shape"])
    if device.type == "meta":
        stored = torch.empty(shape, dtype=dtype, device=device)
    if stored is None:
        raise ArtifactError(f"{what} is missing")
    if list(stored.shape) != shape or stored.dtype is not dtype:
        raise ArtifactError(f"{what} should be {shape} {dtype}, the file has {list(stored.shape)} {stored.dtype}")
    try:
        if "stride" not in record:
            # A file's tensors are views of one mapping of it, and not aligned as kernels like it.
            return stored.to(device, copy=True)
        strided = torch.empty_strided(shape, record["stride"], dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ArtifactError(f"{what} belongs on {device}, which is not available here: {err}") from err
    # Where elements overlap (an expanded tensor) they are equal, and any of them may be written last.
    return strided.copy_(stored) if _distinct(strided) else stored.to(device, copy=True)


def attach(gm: nn.Module, name: str, tensor: Tensor, record: Mapping[str, Any]) -> None:
    """Register a tensor under its qualified name, making the modules on the way.

    Raises:
        ArtifactError: The name is taken by something else.
    """
    *path, last = name.split(".")
    owner = gm
    try:
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None
            owner = child
        if record["kind"] == PARAMETER:
            owner.register_parameter(last, tensor)  # type: ignore[arg-type]
        elif record["kind"] == BUFFER:
            owner.register_buffer(last, tensor, persistent=record.get("persistent", True))
        elif hasattr(owner, last):
            raise KeyError(f"attribute '{last}' already exists")
        else:
            setattr(owner, last, tensor)
    except (KeyError, TypeError) as err:
        raise ArtifactError(f"'{name}' cannot be the name of a tensor: {err.args[0]}") from err


def _owned(gm: GraphModule, prefix: str) -> list[tuple[str, nn.Module, Tensor]]:
    out = []
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        *path, last = str(node.target).split(".")
        owner: Any = gm
        for part in path:
            owner = getattr(owner, part)
        value = getattr(owner, last)
        if isinstance(value, GraphModule):
            out += _owned(value, f"{prefix}{node.target}.")
        elif isinstance(value, Tensor):
            out.append((f"{prefix}{node.target}", owner, value))
        else:
            raise ArtifactError(f"'{node.target}' is a {type(value).__name__}; only tensors and graphs can be saved")
    return out


def _role(owner: nn.Module, name: str) -> dict[str, Any]:
    if name in owner._parameters:
        return {"kind": PARAMETER}
    if name not in owner._buffers:
        return {"kind": CONSTANT}
    return {"kind": BUFFER} | ({"persistent": False} if name in owner._non_persistent_buffers_set else {})


def _as_kind(tensor: Tensor, record: Mapping[str, Any]) -> Tensor:
    requires_grad = bool(record.get("requires_grad"))
    if record["kind"] == PARAMETER:
        return nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor


def _distinct(tensor: Tensor) -> bool:
    """Whether no two elements share memory: sorted by stride, each dimension steps over those inside it."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach = stride * (size - 1) + reach
    return True
