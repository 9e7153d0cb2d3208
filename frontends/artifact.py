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
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..graph.errors import ArtifactError
from .artifact_build import FACTORY_NAME, build, class_name, is_installed_class
from .artifact_record import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    RECORD_FILE,
    check_files,
    read_record,
    record_of,
    sha256,
)
from .artifact_state import check_no_meta, collect, read_tensors, take, write_tensors
from .forward_trace import first_line
from .self_check import fingerprint, quiet, realise, same_fingerprint, tensors_of
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
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(model, record, base, temporary, list(passes), max_shard_size)
        if check:
            _check_saved(model, temporary)
        temporary.chmod(0o755)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
        _self_check(model, data["self_check"], folder)
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
        if not FACTORY_NAME.fullmatch(factory):
            raise ArtifactError(f"factory must be 'package.module:callable', got {factory!r}")
        return {"kind": "factory", "factory": factory}
    if record.config is None or not is_installed_class(type(model)):
        raise ArtifactError(
            f"{type(model).__module__}.{type(model).__name__} is no class of transformers or diffusers; "
            "pass factory='package.module:callable' that makes the unpruned module"
        )
    base = {
        "kind": type(model).__module__.split(".")[0],
        "class": class_name(type(model)),
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
        "versions": _versions(base["kind"]),
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
        "self_check": _fixture(model, record),
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise ArtifactError(f"the record of {type(model).__name__} is no plain data: {err}") from err
    # Runs of kept indices and shapes go on one line each.
    text = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def _versions(kind: str) -> dict[str, str]:
    names = ["graphwright", "torch", "safetensors", *([kind] if kind in ("transformers", "diffusers") else [])]
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _fixture(model: nn.Module, record: WriteBackRecord) -> dict[str, Any]:
    if record.inputs is None:
        return {"skipped": f"the inputs cannot be described: {record.inputs_note}"}
    outputs = _run(model, record.inputs)
    if not outputs:
        return {"skipped": "the module returns no tensors"}
    return {"inputs": record.inputs, "outputs": [fingerprint(t) for t in outputs]}


def _run(model: nn.Module, described: Any) -> list[Tensor]:
    inputs = realise(described)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (inputs["args"], inputs["kwargs"]))
    with quiet(model):
        return tensors_of(model(*args, **kwargs))


def _check_saved(model: nn.Module, folder: Path) -> None:
    """Refuse to hand over an artifact that does not give the module back."""
    loaded = load(folder, allow_factory=True)
    want, got = model.state_dict(), loaded.state_dict()
    for name, tensor in want.items():
        if name not in got or not _identical(tensor, got[name]):
            raise ArtifactError(f"'{name}' of {type(model).__name__} did not survive saving; nothing was written")


def _identical(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _move(temporary: Path, target: Path) -> None:
    """Give the finished directory its name; an earlier artifact of that name is gone only after that."""
    if not target.exists():
        os.rename(temporary, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / "was")
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old / "was", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------- reading


def _set_generation(model: nn.Module, folder: Path) -> None:
    path = folder / GENERATION_FILE
    if not path.is_file() or getattr(model, "generation_config", None) is None:
        return
    from transformers import GenerationConfig

    config = GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    setattr(model, "generation_config", config)  # noqa: B010 (a plain attribute of a library's class)


def _self_check(model: nn.Module, check: Mapping[str, Any], folder: Path) -> None:
    if "skipped" in check:
        return
    try:
        got = [fingerprint(t) for t in _run(model, check["inputs"])]
        wanted = check["outputs"]
        same = len(got) == len(wanted) and all(same_fingerprint(a, b) for a, b in zip(got, wanted, strict=True))
    except (KeyError, TypeError, ValueError) as err:
        raise ArtifactError(f"the self-check of {folder} is damaged: {type(err).__name__}: {err}") from err
    except (RuntimeError, IndexError, AssertionError, AttributeError) as err:
        raise ArtifactError(
            f"{type(model).__name__} from {folder} does not run on the recorded inputs: {first_line(err)}; the "
            "installed versions of its library and of torch may differ from those in the record, under 'versions'"
        ) from err
    if not same:
        raise ArtifactError(
            f"{type(model).__name__} from {folder} does not compute what it computed when it was saved; the installed "
            "versions of its library and of torch may differ from those in the record, under 'versions'"
        )
