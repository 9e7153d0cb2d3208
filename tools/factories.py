"""Factories that a recipe names: found, called with their options, and told apart by their code."""

from __future__ import annotations

from typing import Any

from ..frontends.code_key import function_key
from ..frontends.factory import find_factory, is_factory_name, working_directory_importable
from ..graph.errors import PreconditionError
from .facts import key_or_never
from .recipe_schema import Factory


def call_factory(section: str, chosen: Factory) -> Any:
    """Call the factory of a recipe's ``section`` with its options.

    Raises:
        PreconditionError: It cannot be found, is no callable, or refuses its options.
    """
    with working_directory_importable():
        factory = _found(section, chosen)
        try:
            return factory(**chosen.options)
        except (TypeError, ValueError) as err:
            raise PreconditionError(f"{section} {chosen.factory} refuses its options: {err}") from err


def factory_key(section: str, chosen: Factory | None) -> Any:
    """Return plain data that is the same only for the same factory, options and code.

    Raises:
        PreconditionError: It cannot be found, or is no callable.
    """
    if chosen is None:
        return None
    factory = _found(section, chosen)
    code = key_or_never(chosen.factory, lambda: function_key(factory))
    return {"factory": chosen.factory, "options": dict(chosen.options), "code": code}


def _found(section: str, chosen: Factory) -> Any:
    if not is_factory_name(chosen.factory):
        raise PreconditionError(f"{section} must be package.module:factory, got {chosen.factory!r}")
    factory = find_factory(chosen.factory, PreconditionError)
    if not callable(factory):
        raise PreconditionError(f"{section} {chosen.factory} must be a callable, got {type(factory).__name__}")
    return factory
