"""A hash of everything about a module that its captured graph depends on, except the values of its weights.

The hash covers classes and attributes of every submodule, configurations, shapes and ties of parameters, values of
tensors that are neither parameters nor buffers (capture turns those into constants), functions with what they close
over, the source of every package that took part, and the versions of the libraries. What cannot be described the same
way in another process is refused rather than guessed.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import pathlib
import platform
import re
import sys
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.versions import version_of

# Their versions stand for their source.
LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "accelerate", "peft", "safetensors", "huggingface_hub")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, pathlib.PurePath, re.Pattern)
_TORCH = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)
_BUILTIN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
)
# Capture sets evaluation mode; where a model came from and how it generates do not change its `forward`. The last two
# differ from process to process.
_IGNORED = frozenset(
    """training _name_or_path name_or_path _commit_hash transformers_version _diffusers_version generation_config
    _original_object_hash _use_default_values""".split()
)


class Unstable(Exception):
    """Part of a module cannot be described alike in every process; the message says which."""


class CodeKey:
    """Accumulates a hash of modules and plain values.

    Args:
        model: Its parameters and buffers count by shape and identity, every other tensor by value.
    """

    def __init__(self, model: nn.Module) -> None:
        self._digest = hashlib.sha256()
        self._weights = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id must not be used again while hashing
        self._inside: set[int] = set()
        self._modules: set[str] = set()

    def add(self, value: Any, where: str) -> None:
        """Add a value of almost any kind.

        Raises:
            Unstable: It is of a kind whose description may differ between processes; names ``where``.
        """
        if isinstance(value, enum.Enum):
            self._put("enum", f"{_path(type(value))}.{value.name}")
        elif isinstance(value, _PLAIN):
            self._put(type(value).__name__, repr(value))
        elif isinstance(value, _TORCH):
            self._put("torch", str(value))
        elif isinstance(value, np.generic):
            self._put("scalar", f"{value.dtype} {value!r}")
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
            self._container(value, where)
        elif self._known(value):
            return
        elif isinstance(value, Tensor):
            self._tensor(value, where)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._put("array", f"{value.dtype} {value.shape}", value.tobytes())
        else:
            self._object(value, where)

    def uses(self, module: str) -> None:
        """Add the source of a module, and of what it has imported at its top."""
        self._modules.add(module)

    def hexdigest(self) -> str:
        """Return the hash, with the versions and sources of every package that took part."""
        for name in ("graphwright", *LIBRARIES):
            self._put("version", f"{name} {_version(name)}")
        self._put("python", platform.python_version())
        files, packages = self._sources()
        for package in sorted(packages):
            self._put("version", f"{package} {_version(package)}")
        for file in sorted(files):
            self._put("source", file.name, file.read_bytes())
        return self._digest.hexdigest()

    def _put(self, kind: str, text: str, data: Any = b"") -> None:
        # Lengths keep neighbours apart: ("ab", "c") is not ("a", "bc").
        self._digest.update(f"{kind} {len(text)} {text} {len(data)} ".encode())
        self._digest.update(data)

    def _known(self, value: Any) -> bool:
        number = self._seen.get(id(value))
        if number is not None:
            self._put("again", str(number))
            return True
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return False

    def _tensor(self, value: Tensor, where: str) -> None:
        if value.layout is not torch.strided or type(value) not in (Tensor, nn.Parameter):
            raise Unstable(f"{where} is a {type(value).__name__} of layout {value.layout}")
        text = f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device} {value.requires_grad}"
        if id(value) in self._weights:
            self._put(type(value).__name__, text)
        elif value.is_meta or not value.numel():
            self._put("constant", text)
        else:
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._put("constant", text, data)

    def _container(self, value: Any, where: str) -> None:
        # Whether equal containers are one object depends on how they came about; only cycles count.
        if id(value) in self._inside:
            self._put("cycle", "")
            return
        self._inside.add(id(value))
        self._put("container", f"{_path(type(value))} {len(value)}")
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str) or key not in _IGNORED:
                    self.add(key, f"a key of {where}")
                    self.add(item, f"{where}[{key!r}]")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                self.add(item, f"{where}[{i}]")
        elif all(isinstance(item, (*_PLAIN, *_TORCH)) for item in value):
            self._put("set", repr(sorted(map(repr, value))))
        else:
            raise Unstable(f"{where} is a set, whose order is not the same in every process")
        self._inside.remove(id(value))

    def _object(self, value: Any, where: str) -> None:
        if isinstance(value, type):
            self._named(value)
        elif isinstance(value, types.FunctionType):
            self._function(value, where)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__, where)
            self.add(value.__self__, where)
        elif isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords), where)
        elif isinstance(value, types.ModuleType):
            self._put("module", value.__name__)
        elif isinstance(value, logging.Logger):
            self._put("logger", value.name)
        elif isinstance(value, weakref.ref):
            self.add(value(), where)
        elif isinstance(value, _BUILTIN):
            self._builtin(value, where)
        elif hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
            self._instance(value, where)
        else:
            raise Unstable(f"{where} is a {_path(type(value))}")

    def _instance(self, value: Any, where: str) -> None:
        made_in_c = [cls for cls in type(value).__mro__[:-1] if _is_made_in_c(cls)]
        if made_in_c:
            raise Unstable(f"{where} is a {_path(type(value))}, whose state is not visible")
        self._named(type(value))
        for name, item in _fields(value).items():
            if name in _IGNORED:
                continue
            self._put("field", str(name))
            # The keys of hooks are numbers from a counter of the whole process.
            self.add(tuple(item.values()) if "_hooks" in name and isinstance(item, dict) else item, f"{where}.{name}")

    def _named(self, cls: type) -> None:
        for base in cls.__mro__:
            self._put("class", _path(base))
            self._modules.add(base.__module__)
        if "<locals>" in cls.__qualname__:
            # A class made inside a function: its methods may close over what differs from call to call.
            for name, item in vars(cls).items():
                if isinstance(item, types.FunctionType):
                    self.add(item, f"{_path(cls)}.{name}")

    def _function(self, value: types.FunctionType, where: str) -> None:
        self._put("function", f"{value.__module__}:{value.__qualname__}")
        self._modules.add(value.__module__)
        self._code(value.__code__)
        self.add((value.__defaults__, value.__kwdefaults__), f"the defaults of {where}")
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self._put("cell", name)
            try:
                self.add(cell.cell_contents, f"{name} in {where}")
            except ValueError:  # not assigned yet
                self._put("cell", "empty")

    def _code(self, code: types.CodeType) -> None:
        self._put("code", f"{code.co_names} {code.co_varnames}", code.co_code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            elif isinstance(constant, frozenset):
                self._put("constant", repr(sorted(map(repr, constant))))
            else:
                self._put("constant", repr(constant))

    def _builtin(self, value: Any, where: str) -> None:
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, (types.ModuleType, type)):
            raise Unstable(f"{where} is a method of a {_path(type(owner))}")
        owner_name = getattr(owner, "__name__", getattr(value, "__objclass__", None))
        self._put("builtin", f"{owner_name} {value.__qualname__}")

    def _sources(self) -> tuple[set[Path], set[str]]:
        """Return the files of the modules that took part and of those they use, and the installed packages used.

        Installed packages count by version, unless a module of theirs took part.
        """
        files: set[Path] = set()
        packages: set[str] = set()
        left = [name for name in self._modules if not _is_versioned(name)]
        seen = set(left)
        while left:
            name = left.pop()
            file = getattr(sys.modules.get(name), "__file__", None)
            if file is None:
                raise Unstable(f"the source of {name} is in no file")
            files.add(Path(file))
            for used in _used_by(name) - seen:
                seen.add(used)
                if _package(used) == _package(name) or not _is_installed(used):
                    left.append(used)
                else:
                    packages.add(_package(used))
        return files, packages


def function_key(function: Any) -> str:
    """Return a hash of a function, of what it closes over, and of the source that it uses.

    Raises:
        Unstable: It cannot be described alike in every process.
    """
    key = CodeKey(nn.Module())
    key.add(function, getattr(function, "__qualname__", type(function).__qualname__))
    return key.hexdigest()


def _used_by(name: str) -> set[str]:
    """Return the modules whose classes and functions, or which themselves, are global names of a module."""
    found = set()
    for value in list(vars(sys.modules[name]).values()):
        owner = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        # A package has its submodules for attributes as soon as anybody imports them.
        inside = isinstance(value, types.ModuleType) and value.__name__.startswith(f"{name}.")
        if isinstance(owner, str) and not inside and owner != "graphwright" and not _is_versioned(owner):
            if getattr(sys.modules.get(owner), "__file__", None) is not None:
                found.add(owner)
    return found


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_installed(module: str) -> bool:
    parts = Path(sys.modules[module].__file__ or "").parts
    return "site-packages" in parts or "dist-packages" in parts


def _fields(value: Any) -> dict[str, Any]:
    """Return the instance attributes of an object, those in slots included."""
    fields = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                fields[name] = getattr(value, name)
    return fields


def _is_made_in_c(cls: type) -> bool:
    heap = cls.__flags__ & (1 << 9)
    return not heap or cls.__module__.startswith(("torch._C", "pybind11"))


def _is_versioned(module: str) -> bool:
    """Whether a module's source follows from a version: a library's, or Python's."""
    package = _package(module)
    return package in LIBRARIES or (package in sys.stdlib_module_names and package != "__main__")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _version(package: str) -> str:
    module = sys.modules.get(package)
    found = getattr(module, "__version__", None)
    if found is not None:
        return str(found)
    return version_of(package) or "none"
