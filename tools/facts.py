"""Facts that a run's results depend on (weights, versions, machine), and facts of programs for reports."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..frontends.code_key import Unstable
from ..frontends.named_tensors import named_tensors
from ..graph.cost import Cost, cost
from ..graph.depgraph import DepGraph
from ..graph.program import Program
from ..graph.versions import versions_of

logger = logging.getLogger(__name__)

PACKAGES = ("graphwright", "torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime")


def versions() -> dict[str, str]:
    """Return the versions of what takes part in a run, Python's included."""
    return {"python": platform.python_version(), **versions_of((*PACKAGES, "onnxruntime-gpu"))}


def machine() -> dict[str, Any]:
    """Return what latency depends on, apart from the versions."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def weights_hash(model: nn.Module) -> str:
    """Return a hash of the names, dtypes, shapes and values of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        _add(digest, tensor)
    return digest.hexdigest()


def inputs_hash(leaves: list[Any]) -> str:
    """Return a hash of flat inputs: values of tensors, text of everything else."""
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)};".encode())
            _add(digest, leaf)
        else:
            digest.update(f"{leaf!r};".encode())
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    if not tensor.is_meta and tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def key_or_never(what: str, make: Callable[[], str]) -> str:
    """Return the hash that ``make`` returns, or where it raises `Unstable` one that nothing ever has again.

    What depends on such a hash is done anew in every run.
    """
    try:
        return make()
    except Unstable as err:
        logger.info("what depends on %s is done anew: %s", what, err)
        return f"unstable {uuid.uuid4().hex}"


def cost_facts(program: Program) -> dict[str, int]:
    """Return the cost of a program as plain data."""
    found: Cost = cost(program)
    return {
        "parameters": found.parameters,
        "parameter_bytes": found.parameter_bytes,
        "macs": found.macs,
        "product_macs": found.product_macs,
        "total_macs": found.total_macs,
        "activation_bytes": found.activation_bytes,
        "operators": sum(node.op == "call_function" for node in program.nodes),
    }


def input_facts(program: Program) -> list[dict[str, Any]]:
    """Return the inputs of a program as plain data."""
    return [
        {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
        if spec.is_tensor
        else {"name": spec.name, "constant": repr(spec.constant)}
        for spec in program.inputs
    ]


def group_facts(graph: DepGraph) -> list[dict[str, Any]]:
    """Return the coupling groups as plain data."""
    return [
        {
            "name": group.name,
            "kind": group.kind,
            "size": group.size,
            "step": group.step,
            "exactness": group.exactness,
            "because": list(group.because),
            "members": [{"name": m.name, "dim": m.dim, "trainable": m.trainable} for m in group.members],
        }
        for group in graph.groups
    ]


def frozen_facts(graph: DepGraph) -> list[dict[str, Any]]:
    """Return the frozen axes as plain data, with what freezes them."""
    return [
        {
            "reason": axis.reason,
            "where": axis.where,
            "size": str(axis.size) if not isinstance(axis.size, int) else axis.size,
            "members": [{"name": name, "dim": dim} for name, dim in axis.members],
        }
        for axis in graph.frozen
    ]
