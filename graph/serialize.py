"""Saved programs: a directory of ``program.json``, ``model.safetensors`` and ``example.safetensors``.

Loading runs no code from the files: the graph is rebuilt from names of registered operators, weights are
safetensors, and what would need an import from a package that is not trusted is refused with a sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .document import decode_program, encode_program
from .encoding import decode
from .errors import ArtifactError, VerificationError
from .files import staged_files
from .program import Program
from .symbols import SymbolTable
from .tensor_records import restore, restore_tensors
from .values import at_example_sizes
from .verify import verify

FORMAT = "graphwright program"
FORMAT_VERSION = 1
GRAPH_FILE, WEIGHTS_FILE, EXAMPLE_FILE = "program.json", "model.safetensors", "example.safetensors"
# What a damaged document makes of the code that reads it.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError)


def save_program(program: Program, directory: str | os.PathLike[str]) -> None:
    """Write ``program`` to ``directory``, which is made if needed; a program saved there before is replaced.

    Weights are stored once per tensor (tied names refer to the first), those on the ``meta`` device by shape
    alone. Of where a node comes from, the module path and the innermost line of the user's code are kept.

    Raises:
        ArtifactError: ``directory`` is a file, or the program cannot be saved: it calls something that is no registered
            operator, a tensor has a dtype that safetensors lacks, or a class of its outputs could not be found again.
        OSError: The directory cannot be written. Nothing half-written is left.
    """
    document, data = encode_program(program)
    example = {str(i): leaf for i, leaf in enumerate(program.example) if isinstance(leaf, Tensor) and not leaf.is_meta}
    write(directory, document, {WEIGHTS_FILE: data, EXAMPLE_FILE: example})


def load_program(directory: str | os.PathLike[str]) -> Program:
    """Load what `save_program` wrote, and verify it.

    Every operator is replayed on fake tensors at the example sizes and compared with what was recorded, so that a
    program whose operators mean something else in the installed torch is refused rather than run.

    Raises:
        ArtifactError: The directory holds no saved program, a file is damaged or of another save, it was
            written by a newer version, or it needs an operator, a class or a device that is not here.
    """
    folder = Path(directory)
    document, stamp = read(folder)
    weights = read_tensors(folder / WEIGHTS_FILE, stamp)
    stored = read_tensors(folder / EXAMPLE_FILE, stamp)
    try:
        tensors = restore_tensors(document["tensors"], weights)
        example = [
            restore(f"example input {i}", leaf["tensor"], stored.get(str(i)))
            if "tensor" in leaf
            else decode(leaf["constant"])
            for i, leaf in enumerate(document["example"])
        ]
        program, table = decode_program(document, tensors, example)
        check_recorded(program, table)
    except ArtifactError as err:
        raise ArtifactError(f"{folder}: {err}") from err
    except VerificationError as err:
        raise ArtifactError(
            f"{folder}: the program does not verify; it was saved with torch {document['torch']}, this is torch "
            f"{torch.__version__}: {err}"
        ) from err
    except DAMAGE as err:
        raise ArtifactError(f"{folder / GRAPH_FILE} is damaged: {type(err).__name__}: {err}") from err
    return program


def check_recorded(program: Program, table: SymbolTable) -> None:
    """Verify a decoded program with its symbolic sizes at their examples, so that those are compared too.

    Raises:
        VerificationError: An operator refuses its inputs or gives another shape or dtype than recorded.
    """
    if any("unbacked_bindings" in node.meta for node in program.nodes):
        verify(program)
        return
    static = program.copy()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in static.nodes:
            if "val" in node.meta:
                node.meta["val"] = at_example_sizes(node.meta["val"], table)
    verify(static)


def write(
    directory: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a document of `encode_program` and files of tensors, the document last, each by renaming.

    Raises:
        ArtifactError: ``directory`` is a file, or a tensor has a dtype that safetensors lacks.
    """
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ArtifactError(
            f"{directory} is a file; a saved program is a directory, give the name of one or a new name"
        )
    body = json.dumps({"torch": torch.__version__, **document}, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    head = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": digest})
    with staged_files(directory, last=GRAPH_FILE) as stage:
        for name, group in tensors.items():
            # The digest ties the files together: weights of one save next to the graph of another are refused.
            _write_tensors(stage / name, group, {"program": digest})
        (stage / GRAPH_FILE).write_text(f'{head[:-1]}, "program": {body}}}\n', encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the document of a saved program, checked against its digest, and the digest.

    Raises:
        ArtifactError: The file is missing, damaged, foreign or newer.
    """
    file = folder / GRAPH_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no saved program: there is no {GRAPH_FILE} in it") from None
    except NotADirectoryError:
        raise ArtifactError(f"{folder} is no directory; a saved program is one") from None
    except (UnicodeDecodeError, ValueError) as err:
        raise ArtifactError(f"{file} is damaged, it is no JSON: {err}") from err
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError(f'{file} was not written by graphwright: it does not say "format": "{FORMAT}"')
    version = data.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version}, this graphwright reads up to {FORMAT_VERSION}; upgrade graphwright"
        )
    document, digest = data.get("program"), data.get("sha256")
    body = json.dumps(document, separators=(",", ":"))
    if not isinstance(document, dict) or hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ArtifactError(f"{file} is damaged: its contents do not match its own digest; save the program again")
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
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as handle:
            found = (handle.metadata() or {}).get("program")
        if found != stamp:
            raise ArtifactError(f"{file} does not belong to the {GRAPH_FILE} beside it; save the program again")
        return load_file(file)
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing; save the program again") from None
    except (SafetensorError, KeyError, OSError) as err:
        raise ArtifactError(f"{file} is damaged or no safetensors file: {err}") from err
