"""What an exception means to whoever typed the command: an exit code and one sentence."""

from __future__ import annotations

import sys

FAILED, USAGE = 1, 2


def explain(err: Exception) -> tuple[int, str | None]:
    """Return the exit code and the sentence for ``err``; no sentence where typer has its own way to say it.

    Our own errors say what to do. Anything else is a bug, in this library or in the model's code, and is called one.
    """
    module = type(err).__module__.partition(".")[0]
    if module in ("typer", "click"):
        return USAGE, None
    ours = sys.modules.get("graphwright.graph.errors")
    recipes = sys.modules.get("graphwright.tools.recipe_schema")
    if recipes is not None and isinstance(err, recipes.RecipeError):
        return USAGE, str(err)
    if ours is not None and isinstance(err, ours.GraphwrightError):
        return FAILED, "; ".join([str(err), *getattr(err, "__notes__", ())])
    if isinstance(err, ImportError):
        return FAILED, str(err)
    where = f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
    return FAILED, f"unexpected {where} (a bug in graphwright or in the model; --verbose shows where)"
