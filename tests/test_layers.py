"""Imports point one way: graph <- frontends, passes, backends <- tools; no two modules need each other."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]

# `facade` is the package `graphwright` itself, whose names come from the layers.
ALLOWED = {
    "graph": {"graph"},
    "frontends": {"graph", "frontends"},
    "passes": {"graph", "passes"},
    "backends": {"graph", "backends"},
    "recipes": {"recipes"},
    "tools": {"graph", "frontends", "passes", "backends", "recipes", "tools", "facade"},
}

# What captures, stores and runs models belongs to the frontends and the backends.
FOREIGN = {"accelerate", "diffusers", "onnx", "onnxruntime", "onnxscript", "peft", "transformers"}
# The trainer is the one place that places tensors on devices, and leaves that to accelerate, when it trains.
LAZILY_ALLOWED = {("passes/trainer.py", "accelerate")}


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: Its absolute dotted name, in parts.
        line: Where the statement is.
        relative: Whether the statement starts with a dot.
        eager: Whether it runs when the file is imported: not inside a function, not under ``TYPE_CHECKING``.
    """

    module: tuple[str, ...]
    line: int
    relative: bool
    eager: bool


def modules(layer: str) -> dict[tuple[str, ...], Path]:
    """Map the dotted name of every module of ``layer`` to its file."""
    found = {}
    for file in sorted((ROOT / layer).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found["graphwright", *(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = {name for layer in ALLOWED for name in modules(layer)}


def statements(body: list[ast.stmt], eager: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield the import statements below ``body``, and whether each runs when the file is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, eager
            continue
        inside = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for field, value in ast.iter_fields(node):
            if not isinstance(value, list):
                continue
            for item in value:
                if isinstance(item, ast.ExceptHandler | ast.match_case):
                    yield from statements(item.body, inside)
            nested = [item for item in value if isinstance(item, ast.stmt)]
            yield from statements(nested, inside and not (typing_only and field == "body"))


def imports(source: str, package: tuple[str, ...]) -> Iterator[Import]:
    """Yield what ``source``, a module in ``package``, imports.

    ``from x import name`` is an import of ``x.name`` where that is a module of ours, and of ``x`` otherwise.
    """
    for node, eager in statements(ast.parse(source).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(tuple(alias.name.split(".")), node.lineno, False, eager)
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        base += tuple(node.module.split(".")) if node.module else ()
        for alias in node.names:
            full = (*base, alias.name)
            yield Import(full if full in MODULES else base, node.lineno, node.level > 0, eager)


def imports_of(file: Path) -> list[Import]:
    package = ("graphwright", *file.relative_to(ROOT).parent.parts)
    return list(imports(file.read_text(encoding="utf-8"), package))


def layer_of(module: tuple[str, ...]) -> str | None:
    """Return the layer of a module of ours, None for anybody else's."""
    if module[0] != "graphwright":
        return None
    return module[1] if len(module) > 1 and module[1] in ALLOWED else "facade"


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_point_down(layer: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{found.line} imports {'.'.join(found.module)}"
        for file in modules(layer).values()
        for found in imports_of(file)
        if layer_of(found.module) not in ALLOWED[layer] | {None}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("layer", ALLOWED)
def test_library_code_imports_itself_relatively(layer: str) -> None:
    """Every file has two paths, the real one and the one through the link; relative imports fit both."""
    wrong = [
        f"{file.relative_to(ROOT)}:{found.line} imports {'.'.join(found.module)} by its absolute name"
        for file in modules(layer).values()
        for found in imports_of(file)
        if not found.relative and found.module[0] in {"graphwright", *ALLOWED}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("layer", ["graph", "passes"])
def test_model_libraries_stay_outside(layer: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{found.line} imports {found.module[0]}"
        for file in modules(layer).values()
        for found in imports_of(file)
        if found.module[0] in FOREIGN
        and (found.eager or (file.relative_to(ROOT).as_posix(), found.module[0]) not in LAZILY_ALLOWED)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_in_use() -> None:
    used = {
        (file.relative_to(ROOT).as_posix(), found.module[0])
        for file in modules("passes").values()
        for found in imports_of(file)
        if not found.eager and found.module[0] in FOREIGN
    }
    assert used == LAZILY_ALLOWED


@pytest.mark.parametrize("layer", ALLOWED)
def test_no_import_cycle(layer: str) -> None:
    """Imports inside functions and under ``TYPE_CHECKING`` do not count."""
    inside = modules(layer)
    needs = nx.DiGraph()
    for module, file in inside.items():
        for found in imports_of(file):
            if not found.eager:
                continue
            # Importing a.b.c runs a and a.b as well; those that hold the importer are running already.
            chain = [found.module[:end] for end in range(1, len(found.module) + 1)]
            needed = [m for m in chain if m == found.module or module[: len(m)] != m]
            needs.add_edges_from((module, m) for m in needed if m in inside)
    cycles = [
        " <-> ".join(".".join(m) for m in sorted(c)) for c in nx.strongly_connected_components(needs) if len(c) > 1
    ]
    cycles += [".".join(module) + " imports itself" for module in nx.nodes_with_selfloops(needs)]
    assert not cycles, "\n".join(cycles)


SOURCE = """
import networkx as nx
from . import verify
from .. import capture
from ..passes.base import Pass
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch.fx
else:
    import numpy
try:
    import onnx
except ImportError:
    import yaml
class A:
    import rich
def f():
    with open("x"):
        from graphwright import tools
"""


def test_reader_sees_every_form_of_import() -> None:
    found = {".".join(i.module): (i.relative, i.eager) for i in imports(SOURCE, ("graphwright", "graph"))}
    assert found == {
        "networkx": (False, True),
        "graphwright.graph.verify": (True, True),
        "graphwright": (True, True),
        "graphwright.passes.base": (True, True),
        "typing": (False, True),
        "torch.fx": (False, False),
        "numpy": (False, True),
        "onnx": (False, True),
        "yaml": (False, True),
        "rich": (False, True),
        "graphwright.tools": (False, False),
    }
