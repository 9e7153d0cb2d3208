"""Tracing a module's forward: which attributes it reads, and where it first departs from a Program."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from ..graph.errors import first_line
from ..graph.program import Program
from .attributes import config_of, sizes_of
from .self_check import quiet, tensors_of

# Two values are taken for the same when their moments agree this well, relative to the norm.
MOMENT_TOLERANCE = 1e-3

Moments = tuple[tuple[int, ...], float, float]


def share(model: nn.Module) -> nn.Module:
    """Return a copy of the module objects of ``model`` that shares its parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def attribute_reads(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, set[str]]:
    """Return the names that each module's forward looked up on the module, ``config.x`` for its configuration.

    Of an object whose look-ups cannot be followed (its class has a fixed layout), every size counts as looked up.

    Args:
        model: Is not changed: a copy of its module objects, of classes that keep a log, is run instead.
        run: Calls the module with example inputs.
    """
    spied = share(model)
    logs: dict[int, set[str]] = {}
    classes: dict[type, type] = {}
    opaque: set[int] = set()
    configs = {id(c): c for m in spied.modules() if (c := config_of(m)) is not None}
    for target in (*spied.modules(), *configs.values()):
        kind = type(target)
        if kind not in classes:
            classes[kind] = _logging_class(kind, logs)
        try:
            target.__class__ = classes[kind]
        except TypeError:
            opaque.add(id(target))
    with quiet(spied):
        logs.clear()
        run(spied)
    found = {}
    for path, module in spied.named_modules(remove_duplicate=False):
        config = config_of(module)
        entries = {f"config.{name}" for name in logs.get(id(config), ())} if config is not None else set()
        unknown = {
            name for name, _value in sizes_of(module) if id(config if name.startswith("config.") else module) in opaque
        }
        found[path] = logs.get(id(module), set()) | entries | unknown
    return found


def _logging_class(kind: type, logs: dict[int, set[str]]) -> type:
    look_up: Any = kind.__getattribute__

    def log(self: Any, name: str) -> Any:
        logs.setdefault(id(self), set()).add(name)
        return look_up(self, name)

    body: dict[str, Any] = {
        "__getattribute__": log,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    if issubclass(kind, dict):

        def item(self: Any, key: Any) -> Any:
            logs.setdefault(id(self), set()).add(key)
            return kind.__getitem__(self, key)

        body["__getitem__"] = item
    return type(kind.__name__, (kind,), body)


# ---------------------------------------------------------------------- where two computations part


@dataclass(frozen=True)
class Departure:
    """The first module call that does not give what the program has there.

    Attributes:
        path: Module.
        calls: Module calls that had gone right before.
        what: What went wrong, in words.
        raised: Whether forward came to an end there; False where it gave something else and could go on.
    """

    path: str
    calls: int
    what: str
    raised: bool = False

    def beyond(self, path: str) -> bool:
        """Whether it is neither in module ``path`` nor inside it."""
        return bool(path) and self.path != path and not self.path.startswith(f"{path}.")


def moments(tensor: Tensor) -> Moments:
    """Return shape, norm and a sum with position-dependent weights: enough to tell tensors and their orders apart."""
    values = torch.nan_to_num(tensor.detach().to("cpu", torch.float64).reshape(-1), posinf=0.0, neginf=0.0)
    weights = torch.cos(torch.arange(values.numel(), dtype=torch.float64) * 0.7548776662466927)
    return tuple(tensor.shape), float(values.norm()), float(values @ weights)


class _Recorder(Interpreter):
    """Runs a program and keeps the moments of every tensor in it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.seen: dict[tuple[int, ...], list[Moments]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        for tensor in tensors_of(result) if n.op != "output" else ():
            entry = moments(tensor)
            self.seen.setdefault(entry[0], []).append(entry)
        return result


def program_values(program: Program, leaves: Iterable[Any]) -> dict[tuple[int, ...], list[Moments]]:
    """Run ``program`` and return the moments of all its values, by shape."""
    recorder = _Recorder(program)
    with torch.no_grad():
        recorder.run(*leaves)
    return recorder.seen


def first_departure(
    module: nn.Module,
    run: Callable[[nn.Module], Any],
    values: dict[tuple[int, ...], list[Moments]],
    ignore: frozenset[tuple[str, int]] = frozenset(),
    rescaled: frozenset[str] = frozenset(),
) -> tuple[Departure | None, frozenset[tuple[str, int]]]:
    """Run ``module`` and compare what every submodule returns with the values of a program.

    Args:
        module: To be watched; its state is not changed.
        run: Calls it with the inputs that ``values`` was made with.
        values: Of the program.
        ignore: Calls ``(path, how many earlier calls of that path)`` that match nothing even in a correct module.
        rescaled: Paths of modules inside which values rightly differ from the program's by a factor.

    Returns:
        The first departure, None if there is none, and the calls that matched nothing (all of them, if the run
        completed).
    """
    watcher = _Watcher(values, ignore, rescaled)
    error = watcher.run(module, run)
    if watcher.first is not None:
        return watcher.first, frozenset(watcher.missed)
    if error is not None:
        path = watcher.stack[-1] if watcher.stack else ""
        what = f"{type(error).__name__}: {first_line(error)}"
        return Departure(path, watcher.calls, what, raised=True), frozenset(watcher.missed)
    return None, frozenset(watcher.missed)


class _Watcher:
    def __init__(
        self,
        values: dict[tuple[int, ...], list[Moments]],
        ignore: frozenset[tuple[str, int]],
        rescaled: frozenset[str],
    ) -> None:
        self.rescaled = rescaled
        self.values = values
        self.ignore = ignore
        self.stack: list[str] = []
        self.calls = 0
        self.count: dict[str, int] = {}
        self.missed: set[tuple[str, int]] = set()
        self.first: Departure | None = None

    def run(self, module: nn.Module, run: Callable[[nn.Module], Any]) -> Exception | None:
        with ExitStack() as hooks:
            for path, child in module.named_modules():
                hooks.callback(child.register_forward_pre_hook(self._enter(path)).remove)
                hooks.callback(child.register_forward_hook(self._leave(path)).remove)
            try:
                with quiet(module):
                    run(module)
            except Exception as err:  # whatever a forward with a wrong size raises is the finding
                return err
        return None

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.stack.append(path)

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.stack.pop()
            call = (path, self.count.get(path, 0))
            self.count[path] = call[1] + 1
            inside = any(path != outer and (not outer or path.startswith(f"{outer}.")) for outer in self.rescaled)
            unknown = [] if inside else [t for t in tensors_of(output) if not self._known(t)]
            if not unknown:
                self.calls += 1
            elif call in self.ignore:
                return
            else:
                self.missed.add(call)
                if self.first is None:
                    shapes = "a tensor " + " and ".join(str(list(t.shape)) for t in unknown)
                    what = f"returns {shapes}, which the program does not compute"
                    self.first = Departure(path, self.calls, what)

        return hook

    def _known(self, tensor: Tensor) -> bool:
        shape, norm, weighted = moments(tensor)
        bound = MOMENT_TOLERANCE * max(norm, 1e-30)
        return any(
            math.isclose(norm, n, rel_tol=MOMENT_TOLERANCE) and abs(weighted - w) <= bound
            for _shape, n, w in self.values.get(shape, ())
        )
