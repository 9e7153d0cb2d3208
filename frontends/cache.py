"""A cache of captured graphs: capturing the same model again takes a fraction of torch.export's time.

An entry holds the graph alone. Weights come from the given model by name and are shared with it, as `capture` does;
only constants that export lifted out of the code are stored.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..graph.document import decode_program, encode_program
from ..graph.document_files import FORMAT_VERSION, read, read_tensors, write
from ..graph.errors import ArtifactError
from ..graph.program import Program
from ..graph.serialize import DAMAGE
from ..graph.tensor_records import restore
from .capture import DynamicDims, capture
from .code_key import CodeKey, Unstable
from .named_tensors import named_tensors

logger = logging.getLogger(__name__)

CONSTANTS_FILE = "constants.safetensors"


def default_cache_dir(environment: Mapping[str, str] | None = None) -> Path:
    """Return ``$XDG_CACHE_HOME/graphwright``, or ``~/.cache/graphwright`` where that is not set."""
    base = (os.environ if environment is None else environment).get("XDG_CACHE_HOME")
    # The specification asks to ignore relative paths.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "graphwright"


class Captured(NamedTuple):
    """A program, and whether its graph came from the cache."""

    program: Program
    from_cache: bool


def capture_cached(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    dynamic: DynamicDims | None,
    cache_dir: str | os.PathLike[str],
) -> Program:
    """Capture ``model`` like `capture`, taking the graph from ``cache_dir`` where it was captured before.

    The key covers classes, attributes, configuration, shapes and ties of the model, the source of modules that are not
    of a library, values of tensors that are neither parameters nor buffers, shapes and dtypes of the inputs, constant
    inputs, ``dynamic``, and versions. It does not cover code that a ``forward`` imports only while it runs, nor global
    variables that were changed after import. A model of which no stable description can be made is captured anew.

    An entry that is damaged is logged and replaced; a cache that cannot be written is logged. Entries are never
    removed: delete the directory to empty it.

    Args:
        model: See `capture`.
        args: See `capture`.
        kwargs: See `capture`.
        dynamic: See `capture`.
        cache_dir: Made if missing; see `default_cache_dir`.

    Raises:
        CaptureError: See `capture`.
    """
    return capture_or_load(model, args, kwargs, dynamic, cache_dir).program


def capture_or_load(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    dynamic: DynamicDims | None,
    cache_dir: str | os.PathLike[str],
) -> Captured:
    """Do what `capture_cached` does, and say whether the graph came from the cache."""
    kwargs = dict(kwargs or {})
    try:
        key = capture_key(model, args, kwargs, dynamic)
    except Unstable as err:
        logger.info("the capture of %s is not cached: %s", type(model).__name__, err)
        return Captured(capture(model, args, kwargs, dynamic), False)
    folder = Path(cache_dir) / key[:2] / key
    if folder.is_dir():
        try:
            return Captured(_restore(folder, model, args, kwargs), True)
        except ArtifactError as err:
            logger.warning("the cached capture of %s is ignored and made again: %s", type(model).__name__, err)
    program = capture(model, args, kwargs, dynamic)
    try:
        _store(folder, model, program)
    except (ArtifactError, OSError) as err:
        logger.warning("the capture of %s could not be cached: %s", type(model).__name__, err)
    return Captured(program, False)


def capture_key(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: DynamicDims | None) -> str:
    """Return a hash that is the same only where `capture` would make the same graph.

    Raises:
        Unstable: The model or a constant input cannot be described alike in every process.
    """
    key = CodeKey(model)
    key.add(model, "the model")
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    key.add(str(spec), "the inputs")
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            text = f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype} {leaf.device} {leaf.requires_grad}"
            key.add((type(leaf).__name__, text), f"input {i}")
        else:
            key.add(leaf, f"input {i}")
    names = None if dynamic is None else {n: {int(d): str(label) for d, label in v.items()} for n, v in dynamic.items()}
    key.add(json.dumps(names, sort_keys=True), "dynamic")
    key.add(_modes(), "modes of torch")
    key.add(FORMAT_VERSION, "the format's version")
    for function in (capture, encode_program):
        key.uses(function.__module__)
    return key.hexdigest()


def _modes() -> tuple[Any, ...]:
    """Return the global state of torch that capture sees."""
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), autocast


def _store(folder: Path, model: nn.Module, program: Program) -> None:
    document, _ = encode_program(program)
    owned = named_tensors(model)
    tensors = program.tensors()
    constants = {name: t for name, t in tensors.items() if owned.get(name) is not t}
    for name in document["tensors"].keys() - tensors.keys():
        raise ArtifactError(f"'{name}' is a constant of a branch, which is not cached")
    document["constants"] = sorted(constants)
    write(folder, document, {CONSTANTS_FILE: {name: t for name, t in constants.items() if not t.is_meta}})


def _restore(folder: Path, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """Return the program of an entry, on the weights of ``model`` and the given inputs.

    Raises:
        ArtifactError: The entry is damaged, or is not of this model after all.
    """
    document, stamp = read(folder)
    stored = read_tensors(folder / CONSTANTS_FILE, stamp)
    owned = named_tensors(model)
    try:
        constants = set(document["constants"])
        tensors = {
            name: restore(f"'{name}'", record, stored.get(name))
            if name in constants
            else _given(name, record, owned.get(name))
            for name, record in document["tensors"].items()
        }
        leaves, in_spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        example = _example(leaves, document["example"])
        program, _ = decode_program(document, tensors, example)
    except DAMAGE as err:
        raise ArtifactError(f"{folder} is damaged: {type(err).__name__}: {err}") from err
    if program.in_spec != in_spec:
        raise ArtifactError(f"{folder} is of inputs of another structure: {program.in_spec}")
    return program


def _given(name: str, record: Mapping[str, Any], tensor: Tensor | None) -> Tensor:
    if tensor is None or list(tensor.shape) != record["shape"] or str(tensor.dtype) != f"torch.{record['dtype']}":
        raise ArtifactError(f"'{name}' of the model is not what the entry was made for")
    return tensor


def _example(leaves: Sequence[Any], records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the given inputs as `capture` keeps them: on the model's ``meta`` device, a batch of 1 doubled."""
    out = []
    for leaf, record in zip(leaves, records, strict=True):
        if not isinstance(leaf, Tensor):
            out.append(leaf)
            continue
        if record["tensor"]["device"] == "meta":
            leaf = leaf.to("meta")
        if list(leaf.shape) != record["tensor"]["shape"]:
            leaf = torch.cat([leaf, leaf])
        if list(leaf.shape) != record["tensor"]["shape"]:
            raise ArtifactError(f"the entry was made for inputs of shape {record['tensor']['shape']}")
        out.append(leaf)
    return out
