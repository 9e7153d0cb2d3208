"""Tree specs as plain data: the containers that a program's inputs and outputs sit in.

Classes are stored by path. Loading imports a class only from the packages in `TRUSTED`; a class of any other
package must have been imported by the caller, because importing a module runs its code.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import OrderedDict, defaultdict
from typing import Any

import torch.utils._pytree as pytree

from .errors import ArtifactError

TRUSTED = ("torch", "transformers", "diffusers")
_PLAIN: dict[type, str] = {tuple: "tuple", list: "list", dict: "dict", OrderedDict: "OrderedDict"}
_CLASSES = {name: cls for cls, name in _PLAIN.items()}


def encode_spec(spec: pytree.TreeSpec) -> Any:
    """Return ``None`` for a leaf, ``[kind, context, *children]`` for a container.

    Raises:
        ArtifactError: A container is a local class, or carries a context that is no plain data.
    """
    if spec.type is None:
        return None
    children = [encode_spec(child) for child in spec.children()]
    if spec.type in _PLAIN:
        return [_PLAIN[spec.type], _plain(spec.type, spec.context), *children]
    if spec.type is pytree.namedtuple:  # type: ignore[attr-defined]
        return ["namedtuple", class_path(spec.context), *children]
    if spec.type is defaultdict:
        factory, keys = spec.context
        if factory is not None:
            raise ArtifactError(f"a defaultdict of {factory} cannot be saved; return a dict from the model")
        return ["dict", _plain(dict, keys), *children]
    return [class_path(spec.type), _plain(spec.type, spec.context), *children]


def decode_spec(data: Any) -> pytree.TreeSpec:
    """Return the tree spec that `encode_spec` wrote.

    Raises:
        ArtifactError: A class is missing, or is of a package that is neither trusted nor imported already.
    """
    if data is None:
        return pytree.treespec_leaf()
    if not isinstance(data, list) or len(data) < 2 or not isinstance(data[0], str):
        raise ArtifactError(f"{data!r} is no container")
    kind, context, *rest = data
    children = [decode_spec(child) for child in rest]
    if kind in _CLASSES:
        return pytree.TreeSpec(_CLASSES[kind], context, children)
    if kind == "namedtuple":
        return pytree.TreeSpec(pytree.namedtuple, find_class(context), children)  # type: ignore[attr-defined]
    cls = find_class(kind)
    if cls not in pytree.SUPPORTED_NODES:
        raise ArtifactError(f"{kind} is not registered as a container with torch.utils._pytree")
    return pytree.TreeSpec(cls, context, children)


def class_path(cls: type) -> str:
    """Return ``module:name`` of a class that can be found again.

    Raises:
        ArtifactError: The class is defined inside a function.
    """
    if "<locals>" in cls.__qualname__:
        raise ArtifactError(
            f"{cls.__module__}.{cls.__qualname__} is defined inside a function and cannot be found again when "
            "loading; define it at the top of its module, or return tuples and dicts from the model"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(path: str) -> type:
    """Return the class at ``module:name``, importing only packages in `TRUSTED`.

    Raises:
        ArtifactError: See `decode_spec`.
    """
    module_name, _, name = str(path).partition(":")
    import_trusted(module_name, f"its inputs or outputs are {name} of {module_name}")
    found: Any = sys.modules[module_name]
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ArtifactError(f"{module_name} has no class {name} in the installed version")
    return found


def import_trusted(module_name: str, why: str) -> None:
    """Make sure that a module is imported, doing so only for packages in `TRUSTED`.

    Raises:
        ArtifactError: It is another package's and not imported, or is not installed. ``why`` says what needs it.
    """
    if module_name in sys.modules:
        return
    package = module_name.partition(".")[0]
    if package not in TRUSTED:
        raise ArtifactError(f"{why}: import {module_name} before loading (loading imports no code of its own accord)")
    try:
        importlib.import_module(module_name)
    except ImportError as err:
        raise ArtifactError(f"{why}, and {module_name} cannot be imported: {err}") from err


def _plain(cls: type, context: Any) -> Any:
    try:
        same = json.loads(json.dumps(context)) == context
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ArtifactError(
            f"a {cls.__name__} with the keys {context!r} cannot be saved; use strings for keys in the model's "
            "inputs and outputs"
        )
    return context
