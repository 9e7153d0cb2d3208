"""The tensors of an artifact: which there are, how they are stored, and how a freshly built module takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.errors import ArtifactError
from .named_tensors import get_tensor, named_tensors, set_tensor
from .write_back import WriteBackRecord, apply_record

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BUFFERS_FILE = "buffers.safetensors"

_NAME = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|buffers\.safetensors|(generation_)?config\.json)"
)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class State:
    """The tensors of a module.

    Attributes:
        tensors: Of the state dict, tied ones under their first name.
        aliases: Other name of a tied tensor to its first.
        buffers: What the state dict leaves out.
        frozen: Parameters that need no gradient.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)


def collect(model: nn.Module) -> State:
    """Return the tensors of ``model``.

    Raises:
        ArtifactError: A tensor is on the meta device, or the state holds something that is no tensor.
    """
    check_no_meta(model)
    out = State(frozen=[n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad])
    first: dict[Any, str] = {}
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if not isinstance(tensor, Tensor):
            raise ArtifactError(f"'{name}' in the state of {type(model).__name__} is no tensor and cannot be saved")
        _place(out.tensors, out.aliases, first, name, tensor)
    for name, tensor in model.named_buffers(remove_duplicate=False):
        if name not in persistent:
            _place(out.buffers, out.aliases, first, name, tensor)
    return out


def _place(into: dict[str, Tensor], aliases: dict[str, str], first: dict[Any, str], name: str, tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    key = (
        (storage.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if storage.nbytes()
        else name
    )
    if key in first:
        aliases[name] = first[key]
        return
    first[key] = name
    detached = tensor.detach()
    whole = detached.is_contiguous() and storage.nbytes() == detached.nbytes
    into[name] = detached if whole else detached.contiguous().clone()


def check_no_meta(model: nn.Module) -> None:
    """Raise `ArtifactError` if a tensor of ``model``, a plain attribute included, has no data."""
    for path, module in model.named_modules():
        held = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in held.items():
            if isinstance(value, Tensor) and value.is_meta:
                full = f"{path}.{name}" if path else name
                raise ArtifactError(f"'{full}' is on the meta device: it has no values to save or to run with")


# ---------------------------------------------------------------------- files


def write_tensors(folder: Path, state: State, max_shard_size: int | str) -> None:
    """Write the tensors below ``folder``, in several files with an index where they exceed ``max_shard_size``."""
    from safetensors.torch import save_file

    shards = _shards(state.tensors, _bytes(max_shard_size))
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in state.tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if state.buffers:
        save_file(state.buffers, folder / BUFFERS_FILE, metadata={"format": "pt"})


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"max_shard_size must be bytes or text such as '5GB', got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def files_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Return file name to sha256 of a record, checking that they are names that an artifact has."""
    files = data["files"]
    if not any(str(name).startswith("model") for name in files):
        raise ArtifactError("the record lists no weights")
    for name, digest in files.items():
        if not _NAME.fullmatch(name) or not isinstance(digest, str):
            raise ArtifactError(f"the record lists a file that no artifact has: {name!r}")
    return dict(files)


def read_tensors(folder: Path, data: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the state dict and the other buffers.

    Raises:
        ArtifactError: A file is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for name in files_of(data):
        if not name.endswith(".safetensors"):
            continue
        try:
            (buffers if name == BUFFERS_FILE else weights).update(load_file(folder / name))
        except (SafetensorError, OSError) as err:
            raise ArtifactError(f"{folder / name} is damaged: {err}") from err
    return weights, buffers


# ---------------------------------------------------------------------- taking them


def take(
    model: nn.Module,
    record: WriteBackRecord,
    stored: tuple[dict[str, Tensor], dict[str, Tensor]],
    data: Mapping[str, Any],
) -> None:
    """Make a freshly built module the saved one: sizes, classes, attributes, tensors, ties.

    Raises:
        ArtifactError: Record, tensors and class do not fit together.
    """
    weights, buffers = stored
    aliases: Mapping[str, Any] = data["aliases"]
    owned = named_tensors(model)
    _resize(model, owned, record, {**weights, **buffers, **aliases})
    apply_record(model, record)
    for alias, name in aliases.items():
        if name not in weights and name not in buffers:
            raise ArtifactError(f"the record ties '{alias}' to '{name}', which is not stored")
    persistent = model.state_dict()
    tied = {alias: weights[name] for alias, name in aliases.items() if name in weights and alias in persistent}
    try:
        model.load_state_dict({**weights, **tied}, strict=True, assign=True)
    except RuntimeError as err:
        raise ArtifactError(f"the tensors do not fit {type(model).__name__}: {' '.join(str(err).split())}") from err
    _set_buffers(model, owned, buffers)
    for alias, name in aliases.items():
        set_tensor(model, alias, get_tensor(model, name))
    frozen = set(data["frozen_parameters"])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name not in frozen)


def _resize(model: nn.Module, owned: Mapping[str, Tensor], record: WriteBackRecord, stored: Mapping[str, Any]) -> None:
    """Replace every tensor that the record cuts by an empty one of its new size."""
    for name, dims in record.removal.tensors.items():
        old = owned.get(name)
        if old is None:
            raise ArtifactError(f"{type(model).__name__} has no tensor '{name}', which the record cuts")
        shape = list(old.shape)
        for dim, cut in dims.items():
            if not -len(shape) <= dim < len(shape) or shape[dim] != cut.of:
                raise ArtifactError(
                    f"'{name}' is {list(old.shape)} in {type(model).__name__}, the record was made for size {cut.of} "
                    f"in dimension {dim}: the configuration is not that of the saved model"
                )
            shape[dim] = len(cut.kept)
        if name not in stored:
            raise ArtifactError(f"the record cuts '{name}', which is not stored")
        empty = torch.empty(shape, dtype=old.dtype, device="meta")
        set_tensor(model, name, nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty)


def _set_buffers(model: nn.Module, owned: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    persistent = set(model.state_dict())
    expected = {name for name, _ in model.named_buffers() if name not in persistent}
    for name, tensor in buffers.items():
        if name not in owned or name in persistent:
            raise ArtifactError(f"{type(model).__name__} has no buffer '{name}' outside its state dict")
        set_tensor(model, name, tensor)
    missing = sorted(expected - set(buffers))
    if missing:
        raise ArtifactError(f"the artifact does not hold the buffer '{missing[0]}' of {type(model).__name__}")
