"""How a captured computation is called: its inputs and result as the caller has them, and as a flat list of tensors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .encoding import decode, encode
from .errors import InputError
from .guards import check_guards
from .known_calls import KnownCalls, Places
from .signature import Argument, Signature, arranged
from .signature import decode as decode_signature
from .signature import encode as encode_signature
from .treespec import decode_spec, encode_spec


@dataclass(frozen=True)
class InputSpec:
    """One leaf of a Program's inputs.

    Attributes:
        name: Path of the leaf in the caller's arguments, such as ``sample`` or ``added_cond_kwargs.time_ids``.
        dtype: Of a tensor leaf; None for a constant leaf.
        shape: One entry a dimension: the size, or the name of a dynamic dimension.
        constant: The value a non-tensor leaf was captured with. Another value needs another capture.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | str, ...] = ()
    constant: Any = None

    @property
    def is_tensor(self) -> bool:
        """Whether the leaf is a tensor (else a constant of the capture)."""
        return self.dtype is not None

    def fits(self, value: object, sizes: dict[str, int]) -> bool:
        """Whether ``value`` surely fits this leaf and, in labelled dimensions, the leaves before; `check` says what is wrong.

        Args:
            sizes: Of the labels of the leaves before; those of this leaf are added.
        """
        if self.dtype is None:
            return value is self.constant
        return isinstance(value, Tensor) and value.dtype is self.dtype and fits(self.shape, value.shape, sizes)

    def check(self, value: object) -> None:
        """Raise `InputError` unless ``value`` fits this leaf."""
        if not self.is_tensor:
            if not _same_constant(value, self.constant):
                raise InputError(
                    f"input '{self.name}' was captured as the constant {self.constant!r}, got {value!r}; "
                    "capture the model again with this value"
                )
            return
        if not isinstance(value, Tensor):
            raise InputError(f"input '{self.name}' must be a tensor, got {type(value).__name__}")
        if value.dtype is not self.dtype:
            raise InputError(f"input '{self.name}' must have dtype {self.dtype}, got {value.dtype}")
        fits = len(self.shape) == value.dim() and all(
            isinstance(want, str) or want == got for want, got in zip(self.shape, value.shape, strict=True)
        )
        if not fits:
            want = "[" + ", ".join(map(str, self.shape)) + "]"
            raise InputError(
                f"input '{self.name}' must have shape {want}, got {list(value.shape)}; "
                "name a dimension in capture(dynamic=...) to let it vary"
            )


class CallForm:
    """What everything that stands for a captured module has in common: it is called like the module.

    Attributes:
        name: Class name of the captured module.
        inputs: One entry for each leaf of the inputs.
        in_spec: Tree of ``(args, kwargs)``.
        out_spec: Tree of the result.
        guards: Conditions on the sizes of inputs, in the form of `graphwright.graph.guards`; checked at every call.
        signature: Of the captured module's ``forward``: inputs may be passed by position or by name, and those that
            were left at their defaults may be given again. Without one, inputs are passed as they were captured.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    guards: tuple[str, ...]
    signature: Signature

    def flatten(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Check the inputs against `inputs` and return them in one list.

        Raises:
            InputError: An input is missing, unknown, or has another type, dtype or shape than captured.
        """
        if torch.compiler.is_compiling():
            return self._checked(args, kwargs)
        known = self._known_calls()
        leaves, form = known.look(args, kwargs, self._places)
        if not known.holds(form):
            leaves = self._checked(args, kwargs)
            if form is not None and all(
                s.is_tensor or v is s.constant for s, v in zip(self.inputs, leaves, strict=True)
            ):
                known.remember(form)
        return leaves

    def check(self, form: tuple[Any, ...], *args: Any, **kwargs: Any) -> None:
        """Check inputs as `flatten` does, but once only for inputs of one ``form``, which says all that can be wrong with them.

        Raises:
            InputError: See `flatten`.
        """
        if torch.compiler.is_compiling():
            self._checked(args, kwargs)
            return
        known = self._known_calls()
        if not known.holds(form):
            self._checked(args, kwargs)
            known.remember(form)

    def _checked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        args, named = self._arranged(args, kwargs)
        self._check_count(args)
        kwargs = self._ordered(named)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise InputError(self._other_structure(args, kwargs))
        labels: dict[str, int] = {}
        if not all(spec.fits(leaf, labels) for spec, leaf in zip(self.inputs, leaves, strict=True)):
            self._explain(leaves)
        if self.guards:
            sizes = {s.name: v.shape for s, v in zip(self.inputs, leaves, strict=True) if s.is_tensor}
            check_guards(self.name, self.guards, sizes)
        return leaves

    def _known_calls(self) -> KnownCalls:
        """Return what is known of calls that came before, as long as the form is the one that it was found out for."""
        of = (self.name, self.signature, self.in_spec, self.inputs, self.guards)
        known = self.__dict__.get("_calls")
        if known is None or not known.stands_for(of):
            known = self.__dict__["_calls"] = KnownCalls(of)
        return known

    def _places(self, count: int, names: Iterable[str]) -> Places | None:
        """Return where each leaf comes from when every input is one: a place among those given, or a default."""
        marks = [object() for _ in (*range(count), *names)]
        try:
            args, named = self._arranged(tuple(marks[:count]), dict(zip(names, marks[count:], strict=True)))
            self._check_count(args)
            leaves, spec = pytree.tree_flatten((args, self._ordered(named)))
        except InputError:
            return None
        if spec != self.in_spec:
            return None
        places = {id(mark): place for place, mark in enumerate(marks)}
        return [places.get(id(leaf), (leaf,)) for leaf in leaves]

    def _explain(self, leaves: Sequence[Any]) -> None:
        """Raise `InputError` for the first leaf that does not fit."""
        for leaf, expected in zip(leaves, self.inputs, strict=True):
            expected.check(leaf)
        check_labels((s.name, s.shape, v.shape) for s, v in zip(self.inputs, leaves, strict=True) if s.is_tensor)

    def unflatten(self, values: Sequence[Any]) -> Any:
        """Return flat outputs in the structure of the module's result."""
        return self.out_spec.unflatten(values)

    def _arguments(self) -> list[tuple[str, pytree.TreeSpec]]:
        """Return name and structure of every positional argument, then of every keyword argument."""
        found, at = [], 0
        for spec in (child for group in self.in_spec.children() for child in group.children()):
            name = re.split(r"[.\[]", self.inputs[at].name)[0] if spec.num_leaves else "?"
            found.append((name, spec))
            at += spec.num_leaves
        return found

    def _arranged(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if not self.signature:
            return args, kwargs
        positional, named = self.in_spec.children()
        keywords = list(named.context or ())
        known = {argument.name for argument in self.signature}
        # Inputs that a rewrite added.
        added = tuple(Argument(name, "keyword") for name in keywords if name not in known)
        return arranged(self.name, (*self.signature, *added), len(positional.children()), keywords, args, kwargs)

    def _check_count(self, args: tuple[Any, ...]) -> None:
        count = len(self.in_spec.children()[0].children())
        if len(args) == count:
            return
        names = [name for name, _ in self._arguments()]
        by_name = f", and by name ({', '.join(names[count:])})" if names[count:] else ""
        raise InputError(
            f"{self.name} was captured with {count} positional inputs ({', '.join(names[:count])}){by_name}, "
            f"got {len(args)} positional ones; pass the inputs the way they were captured"
        )

    def _other_structure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        for (name, want), value in zip(self._arguments(), (*args, *kwargs.values()), strict=True):
            got = pytree.tree_structure(value)
            if got != want:
                return (
                    f"input '{name}' of {self.name} was captured as {_structure(want)}, got {_structure(got)}; pass it "
                    "like that, or capture the model again with this structure"
                )
        raise AssertionError("two structures differ in some argument")

    def _ordered(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        # A dict's tree spec remembers the order of its keys; callers may write keywords in any order.
        _args_spec, kwargs_spec = self.in_spec.children()
        known = list(kwargs_spec.context or [])
        unknown = [key for key in kwargs if key not in known]
        missing = [key for key in known if key not in kwargs]
        if unknown or missing:
            wrong = [f"{what}: {names}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
            raise InputError(f"{self.name} was captured with the keyword inputs {known}; {'; '.join(wrong)}")
        return {key: kwargs[key] for key in known}


class Evaluable(CallForm, ABC):
    """A `CallForm` that computes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the inputs of the captured module's ``forward``; return what it returns.

        Raises:
            InputError: See `flatten`.
        """
        return self.evaluate(self.flatten(*args, **kwargs))

    @abstractmethod
    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """Run on inputs as `flatten` returns them, which are not checked again; return what the module returns."""

    @abstractmethod
    def module(self, flat: bool = False) -> nn.Module:
        """Return an ``nn.Module`` with the original's call signature.

        Args:
            flat: Let its ``forward`` take what `flatten` returns, as positional inputs, and check nothing.
        """


@dataclass
class Interface(CallForm):
    """A `CallForm` by itself, for what has no graph, such as an exported file. It has a JSON form."""

    name: str
    inputs: tuple[InputSpec, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    guards: tuple[str, ...] = ()
    signature: Signature = ()

    @classmethod
    def of(cls, form: CallForm) -> Interface:
        """Return how ``form`` is called."""
        return cls(*(getattr(form, entry.name) for entry in fields(cls)))

    def encode(self) -> dict[str, Any]:
        """Return the JSON form, which `decode` reads.

        Raises:
            ArtifactError: A class of the inputs or outputs could not be found again.
        """
        return {
            "name": self.name,
            "guards": list(self.guards),
            "signature": encode_signature(self.signature),
            "inputs": [_encode_input(spec) for spec in self.inputs],
            "in_spec": encode_spec(self.in_spec),
            "out_spec": encode_spec(self.out_spec),
        }

    @classmethod
    def decode(cls, data: Mapping[str, Any]) -> Interface:
        """Return what `encode` wrote.

        Raises:
            ArtifactError: A class of the inputs or outputs is not available here.
        """
        return cls(
            str(data["name"]),
            tuple(_decode_input(entry) for entry in data["inputs"]),
            decode_spec(data["in_spec"]),
            decode_spec(data["out_spec"]),
            tuple(map(str, data.get("guards", ()))),
            decode_signature(data.get("signature", ())),
        )


def _encode_input(spec: InputSpec) -> dict[str, Any]:
    if not spec.is_tensor:
        return {"name": spec.name, "constant": encode(spec.constant)}
    return {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}


def _decode_input(data: Mapping[str, Any]) -> InputSpec:
    if "dtype" not in data:
        return InputSpec(data["name"], constant=decode(data["constant"]))
    return InputSpec(data["name"], decode({"dtype": data["dtype"]}), tuple(data["shape"]))


def _same_constant(value: object, captured: object) -> bool:
    """Whether a constant input has the type and value of the capture; not-a-number is the same as itself."""
    if value is captured:
        return True
    if type(value) is not type(captured):
        return False
    return value == captured or (isinstance(value, (float, complex)) and value != value and captured != captured)


def _structure(spec: pytree.TreeSpec) -> str:
    """Return a tree of inputs in words: ``one value``, ``list(one value, dict a, b (one value, one value))``."""
    if spec.is_leaf():
        return "one value"
    keys = f" {', '.join(map(str, spec.context))} " if spec.type is dict else ""
    kind = getattr(spec.type, "__name__", str(spec.type))
    return f"{kind}{keys}({', '.join(map(_structure, spec.children()))})"


def fits(want: Sequence[int | str], got: Sequence[int], sizes: dict[str, int]) -> bool:
    """Whether a shape is the captured one, with one size for every label; this runs for every input of every call."""
    if len(want) != len(got):
        return False
    for size, known in zip(got, want, strict=True):
        if size != (sizes.setdefault(known, size) if isinstance(known, str) else known):
            return False
    return True


def check_labels(inputs: Iterable[tuple[str, Sequence[int | str], Sequence[int]]]) -> None:
    """Raise `InputError` unless dimensions of one label have one size.

    Args:
        inputs: Of every tensor its name, its captured shape (with labels for dynamic dimensions), and its shape now.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, captured, shape in inputs:
        for label, size in zip(captured, shape, strict=True):
            if not isinstance(label, str):
                continue
            known, first = sizes.setdefault(label, (size, name))
            if known != size:
                raise InputError(
                    f"dimension '{label}' is {known} in input '{first}' and {size} in input '{name}'; it must be the same"
                )
