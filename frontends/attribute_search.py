"""The search for attribute values under which a smaller module computes what its Program computes.

What is certain is set first: torch's layers follow from their tensors, and attributes whose name and value leave no
choice from the sizes inside their module. Then module and program are run. Where the outputs differ, the first module
call that gives what the program has not shows where to look, and the other values its attributes might need are tried,
one and then two at a time; a trial counts as progress when more calls come out right. Equality of the outputs decides,
never a name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ..graph.compare import relative_difference, tolerance_for
from ..graph.depgraph import DepGraph
from ..graph.errors import WriteBackError, first_line
from ..graph.program import Program
from ..graph.resize import RemovalRecord
from .attention_scale import ScaleKeeper
from .attributes import ROLES, Proposal, Value, get_size, proposals, set_size, sizes_of
from .forward_trace import Departure, attribute_reads, first_departure, program_values, share
from .self_check import quiet, second_inputs, tensors_of
from .sizes import HEAD_DIM, VALUE_DIM, SizeChange, SizeChanges
from .torch_layers import is_layer, layer_attributes, layer_literals

logger = logging.getLogger(__name__)

Reads = Mapping[str, set[str]]

# Runs of the module that the search may take.
MAX_TRIALS = 150


@dataclass
class Settled:
    """What was set, in the words of `WriteBackRecord`."""

    attributes: dict[str, dict[str, Value]] = field(default_factory=dict)
    classes: dict[str, tuple[str, float]] = field(default_factory=dict)
    scaled: dict[str, float] = field(default_factory=dict)


class Settler:
    """Sets the attributes of ``work`` so that it computes what ``program`` computes.

    Args:
        model: The caller's module, read only.
        work: A copy of it with the program's tensors; changed.
        program: The shrunk program.
        graph: Analysis of the program before the removal.
        sizes: Sizes inside each module before and after.
        removal: What was removed.
    """

    def __init__(
        self,
        model: nn.Module,
        work: nn.Module,
        program: Program,
        graph: DepGraph,
        sizes: SizeChanges,
        removal: RemovalRecord,
    ) -> None:
        self.model = model
        self.work = work
        self.program = program
        self.graph = graph
        self.sizes = sizes
        self.removal = removal
        self.done = Settled()
        self.tried: list[str] = []
        self._literals = layer_literals(program)
        self._scales = ScaleKeeper(work, graph, sizes, removal)
        self._original = dict(model.named_modules(remove_duplicate=False))
        self._modules = dict(work.named_modules(remove_duplicate=False))

    def settle(self) -> Settled:
        """Find the attributes.

        Raises:
            WriteBackError: There are none under which the outputs are equal.
        """
        # A parametrised weight is computed when it is read; in training mode that may change buffers (spectral norm).
        with quiet(self.work):
            return self._settle()

    def _settle(self) -> Settled:
        self._set_layers()
        self._scales.keep()
        self.done.classes, self.done.scaled = self._scales.classes, self._scales.scaled
        self._set_certain()
        args, kwargs = self.program.example_inputs()
        if self._compare(args, kwargs):
            self._search(args, kwargs)
        args, kwargs = second_inputs(self.program)
        if problem := self._compare(args, kwargs):
            raise WriteBackError(
                f"{self._name()}, written back, equals the program on the example inputs but not on a second input: "
                f"{problem}; capture it with other example inputs and prune it again"
            )
        for path, module in self._modules.items():
            self._note(path, module)
        return self.done

    def _name(self) -> str:
        return type(self.model).__name__

    def _note(self, path: str, module: nn.Module) -> None:
        """Record the attributes of ``module`` that differ from the caller's."""
        original = self._original[path]
        changed = {n: v for n, v in sizes_of(module) if (old := get_size(original, n)) is not None and old != v}
        if changed:
            self.done.attributes[path] = changed

    # ------------------------------------------------------------------ what is certain

    def _set_layers(self) -> None:
        for path, module in self._modules.items():
            if path not in self._literals and not any(True for _ in module.parameters(recurse=False)):
                continue
            for name, value in layer_attributes(module, self._literals.get(path, {})).items():
                if get_size(module, name) not in (None, value):
                    setattr(module, name, value)

    def _set_certain(self) -> None:
        for path, module in self._modules.items():
            changes = self.sizes.inside(path)
            if (
                is_layer(module, self._literals.get(path, {}))
                or path in self.done.classes
                or all(c.old == c.new for c in changes)
            ):
                continue
            for name, value in list(sizes_of(module)):
                options = proposals(path, name, value, changes)
                if options and options[0].sure and not name.startswith("config."):
                    set_size(module, name, options[0].value)

    # ------------------------------------------------------------------ comparing and searching

    def _compare(self, args: Any, kwargs: Any) -> str:
        """Return how the work copy's outputs differ from the program's, in words; nothing if they do not."""
        with torch.no_grad():
            want = tensors_of(self.program(*args, **kwargs))
        try:
            with quiet(self.work):
                got = tensors_of(self.work(*args, **kwargs))
        except Exception as err:  # a forward with a wrong size may raise anything; it is reported, or mended
            return f"{type(err).__name__}: {first_line(err)}"
        if len(got) != len(want):
            return f"{len(got)} output tensors, the program has {len(want)}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"output {i} is {a.dtype} {list(a.shape)}, the program's {b.dtype} {list(b.shape)}"
        for i, (b, error) in enumerate(zip(want, relative_difference(got, want), strict=True)):
            if error > tolerance_for(b.dtype):
                return f"output {i} is off by {error:.1e} of its largest value"
        return ""

    def _search(self, args: Any, kwargs: Any) -> None:
        def run(module: nn.Module) -> Any:
            return module(*args, **kwargs)

        twin = share(self.model)
        before = program_values(self.graph.program, self.graph.program.flatten(*args, **kwargs))
        ignore = first_departure(twin, run, before)[1]
        del before
        values = program_values(self.program, self.program.flatten(*args, **kwargs))
        reads = attribute_reads(self.model, run)

        def check() -> Departure | None:
            return first_departure(self.work, run, values, ignore, frozenset(self._scales.paths))[0]

        departure = check()
        while departure is not None:
            logger.info("write-back of %s: %s %s", self._name(), departure.path or "<root>", departure.what)
            departure = self._improve(departure, check, reads)
        if (problem := self._compare(args, kwargs)) and not self._rescale_rest(args, kwargs):
            raise self._failure(Departure("", 0, problem))

    def _rescale_rest(self, args: Any, kwargs: Any) -> bool:
        """Make up for every scale that is left: what it changes may be too little to show in any module's values."""
        undo = [each for path in self._scales.narrowed() if (each := self._scales.absorb_at(path)) is not None]
        if not undo:
            return False
        self.tried.append("weights that make up for the scale of every attention")
        if not self._compare(args, kwargs):
            return True
        for each in reversed(undo):
            each()
        return False

    def _improve(self, at: Departure, check: Callable[[], Departure | None], reads: Reads) -> Departure | None:
        """Try other values until more module calls come out right; return the next departure."""
        options = self._options(at.path, reads)
        pairs = [(a, b) for a, b in combinations(options, 2) if a.path == b.path and a.name != b.name]
        for choice in [*((o,) for o in options), *pairs]:
            if len(self.tried) >= MAX_TRIALS:
                break
            undo = [(o, get_size(self._modules[o.path], o.name)) for o in choice]
            for option in choice:
                set_size(self._modules[option.path], option.name, option.value)
            self.tried.append(" and ".join(map(str, choice)))
            after = check()
            if after is None or after.calls > at.calls:
                return after
            if not after.raised:
                # Every size fits, but a scale that forward derives from the head width shows only in what comes out.
                better, after = self._rescale(at, check, self.tried[-1])
                if better:
                    return after
            for option, old in undo:
                assert old is not None
                set_size(self._modules[option.path], option.name, old)
        # The sizes may be right and the scale of the scores wrong, where forward derives it from the head width.
        better, after = self._rescale(at, check)
        if better:
            return after
        raise self._failure(at)

    def _rescale(
        self, at: Departure, check: Callable[[], Departure | None], choice: str = ""
    ) -> tuple[bool, Departure | None]:
        """Make up for the scale of some attention's scores; return whether that is right, and the next departure.

        Args:
            at: Where the search is.
            check: Runs the module.
            choice: The values being tried with it, in words. Then it is the attention at ``at``, and all of it must
                come out right: what is inside differs by a factor and proves nothing about them.
        """
        around = _and_around(at.path)
        # An attention whose scores are small comes out nearly right without its scale; what follows tells.
        elsewhere = [] if choice else [path for path in self._scales.narrowed() if path not in around]
        for path in [*around, *elsewhere]:
            undo = self._scales.absorb_at(path)
            if undo is None:
                continue
            words = f"weights that make up for the scale in {path or '<root>'}"
            self.tried.append(f"{choice} and {words}" if choice else words)
            after = check()
            if after is None or (after.calls > at.calls and (not choice or after.beyond(path))):
                return True, after
            undo()
        return False, None

    def _options(self, path: str, reads: Reads) -> list[Proposal]:
        """Return other values for what the module at ``path`` and those around it read, the nearest first."""
        out: list[Proposal] = []
        for around in _and_around(path):
            changes = self.sizes.inside(around)
            for name, value in sizes_of(self._original[around]):
                if name not in reads.get(around, ()):
                    continue
                current = get_size(self._modules[around], name)
                found = [p for p in proposals(around, name, value, changes) if p.value != current]
                if current != value and all(p.value != value for p in found):
                    found.append(Proposal(around, name, value, False))
                out += found
        return out

    def _failure(self, at: Departure) -> WriteBackError:
        tried = f"; tried {'; '.join(self.tried[:8])}" if self.tried else ""
        if len(self.tried) > 8:
            tried += f" and {len(self.tried) - 8} more"
        return WriteBackError(
            f"{self._name()} cannot hold this removal: with the program's tensors, module '{at.path or '<root>'}' "
            f"({type(self._modules[at.path]).__name__}) {at.what}{tried}. {self._advice(at.path)}"
        )

    def _advice(self, path: str) -> str:
        changes = self.sizes.inside(path)
        widths: dict[str, SizeChange] = {}
        for change in changes:
            if change.role in (HEAD_DIM, VALUE_DIM) and change.role not in widths:
                widths[change.role] = change
        one_for_both = any(ROLES.get(name, ("",))[0] == HEAD_DIM for name, _ in sizes_of(self._original[path]))
        if one_for_both and len(widths) == 2 and widths[HEAD_DIM].new != widths[VALUE_DIM].new:
            return (
                f"Its heads keep {widths[HEAD_DIM].new} query and key dimensions and {widths[VALUE_DIM].new} value "
                "dimensions, and its class has one width for both; remove as many of either"
            )
        return "Leave this module's groups out of the removal, or use the program itself (`program.module()`)"


def _and_around(path: str) -> list[str]:
    """Return ``path`` and the modules around it, the innermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
