"""Directories of one JSON document and files of tensors that belong to it, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ArtifactError
from .files import staged_files

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Form:
    """What kind of thing a directory holds.

    Attributes:
        noun: ``program`` or ``plan``: the document's key, and what messages call it.
    """

    noun: str

    @property
    def file(self) -> str:
        """File name of the document."""
        return f"{self.noun}.json"

    @property
    def format(self) -> str:
        """What the document says it is."""
        return f"graphwright {self.noun}"


PROGRAM_FORM, PLAN_FORM = Form("program"), Form("plan")


def write(
    directory: str | os.PathLike[str],
    document: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    form: Form = PROGRAM_FORM,
) -> None:
    """Write a document and files of tensors by their names, the document last, each by renaming.

    Raises:
        ArtifactError: ``directory`` is a file, or a tensor has a dtype that safetensors lacks.
    """
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ArtifactError(
            f"{directory} is a file; a saved {form.noun} is a directory, give the name of one or a new name"
        )
    body = json.dumps({"torch": torch.__version__, **document}, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    head = json.dumps({"format": form.format, "format_version": FORMAT_VERSION, "sha256": digest})
    with staged_files(directory, last=form.file) as stage:
        for name, group in tensors.items():
            # The digest ties the files together: weights of one save next to the graph of another are refused.
            _write_tensors(stage / name, group, {"program": digest})
        (stage / form.file).write_text(f'{head[:-1]}, "{form.noun}": {body}}}\n', encoding="utf-8")


def read(folder: Path, form: Form = PROGRAM_FORM) -> tuple[dict[str, Any], str]:
    """Return the document in a directory, checked against its digest, and the digest.

    Raises:
        ArtifactError: The file is missing, damaged, foreign or newer.
    """
    file = folder / form.file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no saved {form.noun}: there is no {form.file} in it") from None
    except NotADirectoryError:
        raise ArtifactError(f"{folder} is no directory; a saved {form.noun} is one") from None
    except (UnicodeDecodeError, ValueError) as err:
        raise ArtifactError(f"{file} is damaged, it is no JSON: {err}") from err
    if not isinstance(data, dict) or data.get("format") != form.format:
        raise ArtifactError(f'{file} was not written by graphwright: it does not say "format": "{form.format}"')
    version = data.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version}, this graphwright reads up to {FORMAT_VERSION}; upgrade graphwright"
        )
    document, digest = data.get(form.noun), data.get("sha256")
    body = json.dumps(document, separators=(",", ":"))
    if not isinstance(document, dict) or hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ArtifactError(f"{file} is damaged: its contents do not match its own digest; save it again")
    return document, str(digest)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    dense = {name: _dense(tensor) for name, tensor in tensors.items()}
    try:
        save_file(dense, file, metadata=metadata)
    except KeyError:
        dtypes = {str(tensor.dtype): name for name, tensor in dense.items()}
        raise ArtifactError(f"safetensors cannot store one of these dtypes (first tensor of each): {dtypes}") from None


def _dense(tensor: Tensor) -> Tensor:
    """Return the elements in row-major order on the CPU, in memory that holds nothing else."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def read_tensors(file: Path, stamp: str) -> dict[str, Tensor]:
    """Return the tensors of a file that `write` wrote, which must carry the digest ``stamp`` of its document.

    Raises:
        ArtifactError: The file is missing, damaged, or of another save.
    """
    try:
        with safe_open(file, "pt") as handle:
            found = (handle.metadata() or {}).get("program")
        if found != stamp:
            raise ArtifactError(f"{file} does not belong to the document beside it; save it again")
        return load_file(file)
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing; save it again") from None
    except (SafetensorError, KeyError, OSError) as err:
        raise ArtifactError(f"{file} is damaged or no safetensors file: {err}") from err
