"""Load what a user calls a model: a built-in, a directory, a hub name, or a factory in Python."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..graph.document_files import PROGRAM_FORM
from ..graph.errors import GraphwrightError, LoadError
from ..graph.program import Program
from ..graph.serialize import load_program
from .artifact_record import RECORD_FILE
from .factory import find_factory, is_factory_name, working_directory_importable
from .inputs import Inputs, example_inputs, inputs_from_spec
from .pretrained import Options, load_directory, load_gguf, load_hub

PREFIX = "builtin:"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(#[\w./-]+)?")
_FORMS = "builtin:NAME, a directory, a .gguf file, package.module:factory, or a hub name such as org/name"


@dataclass(frozen=True)
class LoadedModel:
    """A model with example inputs.

    Attributes:
        model: The module, as its library or its factory made it.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        dynamic: Names of the dimensions that vary, as `capture` takes them; None for the batch.
        source: What was asked for.
        notes: What the caller may want to know, one sentence each, such as weights that a checkpoint lacks.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: dict[str, dict[int, str]] | None
    source: str
    notes: tuple[str, ...] = ()


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a model by what a user types.

    ``spec`` is one of:

    * ``builtin:NAME``: a model that ships with graphwright;
    * a directory of transformers or diffusers, or one that graphwright wrote; ``DIR#unet`` for a component of a
      diffusers pipeline, ``DIR#file.gguf`` for one of several GGUF files; or a ``.gguf`` file;
    * ``package.module:factory``: a callable without arguments that returns a module, ``(module, args)`` or
      ``(module, args, kwargs)``; modules in the working directory are found. This runs the user's code;
    * ``org/name`` or ``org/name#component``: a name on the hub, if no such directory exists.

    Code inside a model's directory (``trust_remote_code``) is never run.

    Args:
        spec: See above.
        dtype: Convert floating-point weights and inputs to this; None leaves them as the library loads them.
        random_weights: Build from the configuration alone, with random weights, where a directory has none.
        seed: Of random weights. The global random state is left as it was.
        inputs: Example inputs in place of the model's own, as `inputs_from_spec` takes them.

    Raises:
        LoadError: There is no such model, it cannot be loaded, or a factory does not return what it should.
        ArtifactError: A directory that graphwright wrote is damaged.
        PreconditionError: Nothing is known about the model's inputs and none are given.
    """
    options = Options(_dtype(dtype), random_weights, seed)
    model, made, notes = _load(spec, options)
    if inputs is not None:
        made = inputs_from_spec(inputs)
    elif made is None:
        made = example_inputs(model)
    args, kwargs, dynamic = made
    if options.dtype is not None:
        model, (args, kwargs) = _converted(model, (args, kwargs), options.dtype)
    return LoadedModel(model, tuple(args), dict(kwargs), dynamic, spec, notes)


def _load(spec: str, options: Options) -> tuple[nn.Module, Inputs | None, tuple[str, ...]]:
    if spec.startswith(PREFIX):
        return (*_builtin(spec), ())
    name, _, part = spec.partition("#")
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _directory(path, part or None, options)
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(f"{path} is a file; a model is {_FORMS}")
        return (*_without_inputs(load_gguf(path, options)),)
    if is_factory_name(spec):
        return (*_factory(spec), ())
    if spec.startswith((".", "/", "~", os.sep)) or path.suffix == ".gguf" or name.endswith("/"):
        raise LoadError(f"there is no file or directory {path}")
    if _HUB.fullmatch(spec):
        return (*_without_inputs(load_hub(name, part or None, options)),)
    raise LoadError(f"{spec!r} names no model: it is no file or directory here; a model is {_FORMS}")


def _without_inputs(loaded: tuple[nn.Module, tuple[str, ...]]) -> tuple[nn.Module, None, tuple[str, ...]]:
    return loaded[0], None, loaded[1]


def _builtin(spec: str) -> tuple[nn.Module, Inputs]:
    from .builtin import load_builtin

    try:
        model, args, kwargs = load_builtin(spec)
    except (ValueError, ImportError) as err:
        raise LoadError(str(err)) from err
    return model, (args, kwargs, None)


def _directory(path: Path, part: str | None, options: Options) -> tuple[nn.Module, Inputs | None, tuple[str, ...]]:
    if part is None and (path / RECORD_FILE).is_file():
        from .artifact import load

        return load(path), None, ()
    if part is None and (path / PROGRAM_FORM.file).is_file():
        program = load_program(path)
        return program.module(), _inputs_of(program), program.notes
    return _without_inputs(load_directory(path, part, options))


def _inputs_of(program: Program) -> Inputs:
    """Return the program's inputs as its module takes them, whose positional inputs are called arg0, arg1, ..."""
    args, kwargs = program.example_inputs()
    positional, _ = program.in_spec.children()
    heads = [f"arg{i}" for i, child in enumerate(positional.children()) for _ in range(child.num_leaves)]
    dynamic: dict[str, dict[int, str]] = {}
    for i, spec in enumerate(program.inputs):
        head, dot, rest = spec.name.partition(".")
        dims = {dim: size for dim, size in enumerate(spec.shape) if isinstance(size, str)}
        if dims:
            dynamic[(heads[i] if i < len(heads) else head) + dot + rest] = dims
    return args, kwargs, dynamic


# ---------------------------------------------------------------------- factories


def _factory(spec: str) -> tuple[nn.Module, Inputs | None]:
    # Around the call as well: a factory may import while it runs.
    with working_directory_importable():
        factory = find_factory(spec, LoadError)
        if isinstance(factory, nn.Module):
            return factory, None
        if not callable(factory):
            raise LoadError(f"{spec} is a {type(factory).__name__}; it must be a callable that returns a module")
        try:
            made = factory()
        # The user's code may fail with anything; what it was is in the message, and the traceback is kept.
        except Exception as err:
            if isinstance(err, GraphwrightError):
                raise
            raise LoadError(f"{spec}() failed: {type(err).__name__}: {err}") from err
    return _checked(spec, made)


def _checked(spec: str, made: Any) -> tuple[nn.Module, Inputs | None]:
    if isinstance(made, nn.Module):
        return made, None
    what = "it must return a module, (module, args) or (module, args, kwargs)"
    if not isinstance(made, tuple) or not 2 <= len(made) <= 3 or not isinstance(made[0], nn.Module):
        got = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__
        raise LoadError(f"{spec}() returned {got}; {what}")
    model, args = made[:2]
    kwargs = made[2] if len(made) == 3 else {}
    if not isinstance(args, (tuple, list)):
        raise LoadError(f"{spec}() returned args of type {type(args).__name__}, expected a tuple; {what}")
    if not isinstance(kwargs, Mapping):
        raise LoadError(f"{spec}() returned kwargs of type {type(kwargs).__name__}, expected a dict; {what}")
    return model, (tuple(args), dict(kwargs), None)


# ---------------------------------------------------------------------- dtype


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        found = dtype
    else:
        found = getattr(torch, dtype.removeprefix("torch."), None)
    if dtype is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise LoadError(f"dtype must be a floating-point dtype such as float32 or bfloat16, got {dtype!r}")
    return found


def _converted(model: nn.Module, inputs: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return model.to(dtype), pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs
    )
