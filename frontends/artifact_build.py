"""Building the unpruned class that an artifact names: from its configuration, on the CPU, without random weights."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..graph.errors import ArtifactError, first_line
from .factory import find_factory, is_factory_name, working_directory_importable
from .libraries import MODEL_CLASSES, is_library_model

# Implementations of attention that come with the libraries; any other name may fetch code.
ATTENTION = ("eager", "sdpa")

# Initialisers that torch lets a mode take over; sampling methods of tensors are left alone, since some
# initialisers repeat them until the values please.
_INITIALISERS = frozenset((nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_))


class _NoInitialisation(TorchFunctionMode):
    """Leaves tensors as they are where most layers would fill them with random numbers, in this thread only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(base: Mapping[str, Any], config: str | None, allowed: bool | tuple[str, ...]) -> nn.Module:
    """Return the module that the ``base`` entry of a record describes, with arbitrary weights.

    Args:
        base: ``kind`` and ``class`` or ``factory``.
        config: Text of the configuration, for a class of a library.
        allowed: Whether a factory may be called, or the packages it may come from.

    Raises:
        ArtifactError: The class is unknown, the factory is not allowed, or the configuration does not fit.
    """
    kind = base.get("kind")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if kind == "factory":
            return _call_factory(base.get("factory"), allowed)
        if not isinstance(kind, str) or kind not in MODEL_CLASSES:
            raise ArtifactError(
                f"the artifact's class comes from {kind!r}; known are {', '.join(MODEL_CLASSES)} and factories"
            )
        cls = _library_class(kind, base.get("class"))
        values = _config_values(config)
        try:
            with _NoInitialisation():
                return _transformers(cls, values, base) if kind == "transformers" else cls.from_config(values)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as err:
            raise ArtifactError(f"{cls.__name__} cannot be built from config.json: {first_line(err)}") from err


def _library_class(library: str, name: Any) -> Any:
    unknown = ArtifactError(f"the artifact's class {name!r} is no model class of the installed {library}")
    if not isinstance(name, str) or not re.fullmatch(rf"{library}(\.[A-Za-z_]\w*)+:[A-Za-z_]\w*", name):
        raise unknown
    module_name, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError as err:
        raise ArtifactError(f"{unknown}: {err}") from err
    if not isinstance(cls, type) or not issubclass(cls, nn.Module) or not is_library_model(cls):
        raise unknown
    return cls


def _config_values(config: str | None) -> dict[str, Any]:
    try:
        values = json.loads(config or "")
    except ValueError as err:
        raise ArtifactError(f"config.json is damaged: {err}") from err
    if not isinstance(values, dict):
        raise ArtifactError("config.json is damaged: it is not an object")
    return _offline(values)


def _offline(value: Any) -> Any:
    """Switch off what would make a constructor fetch weights."""
    if isinstance(value, dict):
        return {k: False if k == "use_pretrained_backbone" else _offline(v) for k, v in value.items()}
    return [_offline(v) for v in value] if isinstance(value, list) else value


def _transformers(cls: Any, values: dict[str, Any], base: Mapping[str, Any]) -> nn.Module:
    config = cls.config_class.from_dict(values)
    attention = base.get("attention")
    config._attn_implementation = attention if attention in ATTENTION else None
    return cls(config)


def is_plain_factory(name: Any) -> bool:
    """Whether ``name`` is ``package.module:callable`` with the callable at the top of its module.

    A dot behind the colon could lead out of a package that the caller trusts, through a module that it imports.
    """
    return isinstance(name, str) and is_factory_name(name) and "." not in name.partition(":")[2]


def _call_factory(name: Any, allowed: bool | tuple[str, ...]) -> nn.Module:
    if not is_plain_factory(name):
        raise ArtifactError(f"the artifact's factory {name!r} is not of the form 'package.module:callable'")
    module_name = name.partition(":")[0]
    trusted = (
        allowed
        if isinstance(allowed, bool)
        else any(module_name == package or module_name.startswith(f"{package}.") for package in allowed)
    )
    if not trusted:
        raise ArtifactError(
            f"the artifact is built by the factory '{name}', which is code; if you trust it, "
            f"pass allow_factory='{module_name.split('.')[0]}'"
        )
    with working_directory_importable():
        made = find_factory(name, ArtifactError)()
    module = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(module, nn.Module):
        raise ArtifactError(f"the factory '{name}' returned a {type(made).__name__}, expected a module")
    return module
