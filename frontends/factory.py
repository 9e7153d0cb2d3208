"""Factories: callables of the user's own code, named as ``package.module:callable``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..graph.errors import GraphwrightError, unknown

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_factory_name(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:callable``; the callable may be inside a class."""
    return _NAME.fullmatch(text) is not None


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Find modules in the working directory, as ``python -m`` does and an installed command does not."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def find_factory(name: str, error: type[GraphwrightError]) -> Any:
    """Import what ``package.module:callable`` names, from the installed modules or the working directory.

    This runs the user's module.

    Raises:
        GraphwrightError: There is no such module or name, or importing it fails; of the class ``error``.
    """
    module_name, _, attributes = name.partition(":")
    with working_directory_importable():
        found = _import(name, module_name, error)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            public = [n for n in dir(found) if not n.startswith("_")]
            owner = getattr(found, "__name__", found)
            raise error(f"{name} cannot be imported: " + unknown(f"{owner} has no", attribute, public))
        found = getattr(found, attribute)
    return found


def _import(name: str, module_name: str, error: type[GraphwrightError]) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name is not None and f"{module_name}.".startswith(f"{err.name}."):
            raise error(
                f"there is no module {err.name} for {name}; modules are looked for among the installed ones and in the "
                "working directory"
            ) from err
        raise error(f"{module_name} needs the module {err.name}, which is not installed") from err
    # Importing runs the user's module, which may fail with anything.
    except Exception as err:
        raise error(f"importing {module_name} failed: {type(err).__name__}: {err}") from err
