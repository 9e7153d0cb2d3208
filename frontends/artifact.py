"""Saving a smaller module and loading it again in one call, without pickle.

    config.json          the original configuration, unchanged (transformers and diffusers models)
    model.safetensors    tensors at their new sizes under their original names; several files above `max_shard_size`
    buffers.safetensors  buffers that a state dict leaves out
    graphwright.json     the record: what was removed, attributes, self-check, hashes

`load` builds the class from the configuration, does the removal on it, takes the tensors and runs the self-check. It
runs no code from the artifact: a record names a class of transformers or diffusers, or a factory that the caller has to
allow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..graph.errors import ArtifactError
from ..graph.files import sha256, staged_directory
from ..graph.treespec import class_path
from ..graph.versions import versions_of
from .artifact_build import build, is_plain_factory
from .artifact_record import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    RECORD_FILE,
    check_files,
    read_record,
    record_of,
)
from .artifact_state import check_no_meta, collect, read_tensors, take, write_tensors
from .libraries import MODEL_CLASSES, is_library_model
from .self_check import record_self_check, run_self_check
from .write_back import RECORD, WriteBackRecord, config_text

GENERATION_FILE = "generation_config.json"


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    factory: str | None = None,
    passes: Iterable[Any] = (),
    max_shard_size: int | str = "5GB",
    check: bool = True,
) -> Path:
    """Save a module that `write_back` returned.

    Args:
        model: With its ``graphwright_record``; it may have been trained since.
        directory: Made if missing. An artifact in it is replaced; any other content is refused.
        factory: ``package.module:callable`` that makes the unpruned module (or a tuple that starts with it), for a
            module that is not a class of transformers or diffusers. `load` calls it only when its caller allows that.
        passes: What led here, one plain value each; by default what `write_back` was told.
        max_shard_size: Bytes, or text such as ``"5GB"``, above which the tensors go into several files.
        check: Load what was written and compare every tensor before the directory gets its name.

    Returns:
        The directory.

    Raises:
        ArtifactError: The module has no record, it cannot be rebuilt from what is saved, or the directory holds other
            files.
    """
    target = Path(directory)
    record = vars(model).get(RECORD)
    if not isinstance(record, WriteBackRecord):
        raise ArtifactError(
            f"{type(model).__name__} has no removal record; save what write_back returned "
            "(an unpruned model has its own way of saving)"
        )
    _check_target(target)
    base = _base(model, record, factory)
    with staged_directory(target) as folder:
        _write(model, record, base, folder, list(passes), max_shard_size)
        if check:
            _check_saved(model, folder)
    return target


def load(
    directory: str | os.PathLike[str],
    *,
    allow_factory: bool | str | Iterable[str] = False,
    self_check: bool = True,
) -> nn.Module:
    """Load what `save` wrote: the original class, smaller, on the CPU, in evaluation mode.

    Args:
        directory: Of the artifact.
        allow_factory: Whether a factory named by the artifact may be imported and called: True, or the package (or
            packages) it must come from.
        self_check: Run the module on the recorded inputs and compare its outputs with the recorded ones.

    Raises:
        ArtifactError: A file is missing, damaged, foreign or of a newer format; the class is unknown; the factory is
            not allowed; the tensors do not fit; or the outputs are not those of the saved module.
    """
    folder = Path(directory)
    data = read_record(folder)
    check_files(folder, data)
    record = record_of(folder, data)
    allowed = (allow_factory,) if isinstance(allow_factory, str) else allow_factory
    model = build(data["base"], record.config, allowed if isinstance(allowed, bool) else tuple(allowed))
    take(model, record, read_tensors(folder, data), data)
    check_no_meta(model)
    setattr(model, RECORD, record)
    _set_generation(model, folder)
    model.eval()
    if self_check:
        run_self_check(model, data["self_check"], str(folder))
    return model


# ---------------------------------------------------------------------- writing


def _check_target(target: Path) -> None:
    if target.is_dir():
        foreign = sorted(p.name for p in target.iterdir())
        if foreign and not _is_ours(target):
            raise ArtifactError(
                f"{target} holds other files ({', '.join(foreign[:3])}); save into an empty or new directory"
            )
    elif target.exists():
        raise ArtifactError(f"{target} is a file; save into a directory")


def _is_ours(folder: Path) -> bool:
    with suppress(ArtifactError):
        return read_record(folder)["format"] == FORMAT
    return False


def _base(model: nn.Module, record: WriteBackRecord, factory: str | None) -> dict[str, Any]:
    if factory is not None:
        if not is_plain_factory(factory):
            raise ArtifactError(f"factory must be 'package.module:callable', got {factory!r}")
        return {"kind": "factory", "factory": factory}
    if record.config is None or not is_library_model(type(model)):
        raise ArtifactError(
            f"{type(model).__module__}.{type(model).__name__} is no class of transformers or diffusers; "
            "pass factory='package.module:callable' that makes the unpruned module"
        )
    base = {
        "kind": type(model).__module__.split(".")[0],
        "class": class_path(type(model)),
        "config_sha256": hashlib.sha256(_config(model, record).encode()).hexdigest(),
    }
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return base | ({"attention": attention} if isinstance(attention, str) else {})


def _config(model: nn.Module, record: WriteBackRecord) -> str:
    """Return the configuration without the sizes that write-back set, with what the caller has set since."""
    resized = any(name.startswith("config.") for name in record.attributes.get("", {}))
    text = None if resized else config_text(model)
    return text or record.config or ""


def _write(
    model: nn.Module,
    record: WriteBackRecord,
    base: dict[str, Any],
    folder: Path,
    passes: list[Any],
    max_shard_size: int | str,
) -> None:
    state = collect(model)
    write_tensors(folder, state, max_shard_size)
    if base["kind"] != "factory":
        (folder / CONFIG_FILE).write_text(_config(model, record), encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if base["kind"] == "transformers" and generation is not None:
        (folder / GENERATION_FILE).write_text(generation.to_json_string(use_diff=False), encoding="utf-8")
    owned = {*state.tensors, *state.aliases, *state.buffers}
    removal = record.removal.to_json()
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions_of(["graphwright", "torch", "safetensors", *({base["kind"]} & MODEL_CLASSES.keys())]),
        "base": base,
        "passes": passes or list(record.passes),
        "groups": removal["groups"],
        "tensors": {name: dims for name, dims in removal["tensors"].items() if name in owned},
        "attributes": record.attributes,
        "classes": {path: list(value) for path, value in record.classes.items()},
        "extra": record.extra,
        "inputs": record.inputs,
        "inputs_note": record.inputs_note,
        "aliases": state.aliases,
        "frozen_parameters": state.frozen,
        "self_check": record_self_check(model, record.inputs, record.inputs_note),
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise ArtifactError(f"the record of {type(model).__name__} is no plain data: {err}") from err
    # Runs of kept indices and shapes go on one line each.
    text = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def _check_saved(model: nn.Module, folder: Path) -> None:
    """Refuse to hand over an artifact that does not give the module back."""
    described = vars(model)[RECORD].inputs is not None
    got = load(folder, allow_factory=True, self_check=described).state_dict()
    for name, tensor in model.state_dict().items():
        if name in got and _identical(tensor, got[name]):
            continue
        found = "is missing" if name not in got else f"is {_words(got[name])}"
        raise ArtifactError(
            f"'{name}' of {type(model).__name__} {found} after saving and loading, expected {_words(tensor)}; nothing was "
            "written: let no hook or property change tensors when a state dict is loaded, or save with check=False"
        )


def _words(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} of norm {float(tensor.double().norm()):.6g}"
    )


def _identical(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


# ---------------------------------------------------------------------- reading


def _set_generation(model: nn.Module, folder: Path) -> None:
    path = folder / GENERATION_FILE
    if not path.is_file() or getattr(model, "generation_config", None) is None:
        return
    from transformers import GenerationConfig

    config = GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    setattr(model, "generation_config", config)  # noqa: B010 (a plain attribute of a library's class)
