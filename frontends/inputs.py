"""Example inputs: from a model's configuration and the signature of its ``forward``, or from what a user writes.

Values are drawn from a seeded generator of their own. Every batch has two samples, because torch.export takes a
batch of one for a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.errors import PreconditionError, unknown
from .inputs_diffusers import diffusers_inputs
from .inputs_draw import BATCH, Draw
from .inputs_transformers import transformers_inputs
from .libraries import derives_from

Inputs = tuple[tuple[Any, ...], dict[str, Any], dict[str, dict[int, str]] | None]

_FIELDS = ("shape", "dtype", "low", "high", "value", "dynamic")
_HOW = (
    "say what goes in with `inputs: {name: {shape: [2, 3], dtype: float32}}` in the recipe (or inputs= in Python), or "
    "name a factory that returns (module, args, kwargs)"
)


def example_inputs(model: nn.Module) -> Inputs:
    """Make example inputs for a model of transformers, diffusers, timm or with an ``example_input_array``.

    Tensors are of the model's dtype and on its device. Sizes are the configuration's own (image and sample sizes, mel
    bins) with short texts; caches are off and attention masks are left out.

    Returns:
        ``(args, kwargs, dynamic)`` for `capture`. ``dynamic`` is None: the batch, which is what every first dimension
        of size 2 is, varies.

    Raises:
        PreconditionError: Nothing is known about the model's inputs; says how to give them.
    """
    draw = Draw.like(model)
    array = getattr(model, "example_input_array", None)
    if isinstance(array, Tensor):
        return (array,), {}, None
    if isinstance(array, (tuple, list)):
        return tuple(array), {}, None
    for library, make in (("transformers", transformers_inputs), ("diffusers", diffusers_inputs)):
        if derives_from(type(model), library):
            kwargs = make(model, draw)
            if kwargs is not None:
                return (), kwargs, None
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")  # timm
    if size is not None:
        return (draw.normal(BATCH, *size),), {}, None
    raise PreconditionError(f"the inputs of {type(model).__name__} are not known; {_HOW}")


def inputs_from_spec(spec: Mapping[str, Any], *, seed: int = 0) -> Inputs:
    """Make inputs from a description, as a recipe has it under ``inputs``.

    Each entry is a keyword argument of ``forward``; a dot in its name reaches into a dictionary
    (``added_cond_kwargs.time_ids``). A tensor is described by ``shape`` with ``dtype`` (float32 unless given), ``low``
    and ``high`` (drawn below it; needed for integers) or ``value`` (every element), and ``dynamic``, names of the
    dimensions that vary: ``{0: batch}``. Anything else, and ``{value: ...}`` without a shape, is a constant.

    Args:
        spec: Name to description.
        seed: Of the values.

    Returns:
        ``(args, kwargs, dynamic)`` for `capture`; ``args`` is empty, and ``dynamic`` is None unless an entry has one.

    Raises:
        PreconditionError: An entry is malformed; says which, what was expected and what it is.
    """
    draw = Draw(seed=seed)
    kwargs: dict[str, Any] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for name, entry in spec.items():
        value = _from_entry(str(name), entry, draw)
        *path, last = str(name).split(".")
        into = kwargs
        for part in path:
            into = into.setdefault(part, {})
            if not isinstance(into, dict):
                raise PreconditionError(f"inputs: '{name}' is inside '{part}', which is given as a value of its own")
        if last in into:
            raise PreconditionError(f"inputs: '{name}' is given twice")
        into[last] = value
        if isinstance(entry, Mapping) and entry.get("dynamic"):
            dynamic[str(name)] = _dimensions(str(name), entry["dynamic"], value)
    return (), kwargs, dynamic or None


def _from_entry(name: str, entry: Any, draw: Draw) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    for key in entry:
        if key not in _FIELDS:
            raise PreconditionError(unknown(f"inputs: '{name}' has an unknown field", key, _FIELDS))
    if "shape" not in entry:
        if set(entry) == {"value"}:
            return entry["value"]
        raise PreconditionError(f"inputs: '{name}' needs a shape, such as [{BATCH}, 3, 32, 32], or a value alone")
    shape, dtype = _shape(name, entry["shape"]), _dtype(name, entry.get("dtype", "float32"))
    if "value" in entry:
        return torch.full(shape, entry["value"], dtype=dtype)
    low, high = entry.get("low"), entry.get("high")
    if dtype.is_floating_point and low is None and high is None:
        return draw.normal(*shape).to(dtype)
    if high is None:
        raise PreconditionError(
            f"inputs: '{name}' of dtype {dtype} needs `high`, the number that its values stay below (the vocabulary's "
            "size, the number of classes), or `value`"
        )
    low = 0 if low is None else low
    if not low < high:
        raise PreconditionError(f"inputs: '{name}' needs low < high, got low {low} and high {high}")
    if dtype.is_floating_point:
        return (draw.uniform(*shape) * (high - low) + low).to(dtype)
    return draw.integers(*shape, low=int(low), high=int(high)).to(dtype)


def _shape(name: str, shape: Any) -> list[int]:
    if not isinstance(shape, (list, tuple)) or any(type(size) is not int or size < 0 for size in shape):
        raise PreconditionError(f"inputs: the shape of '{name}' must be a list of sizes such as [2, 3], got {shape!r}")
    return list(shape)


def _dtype(name: str, dtype: Any) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or found.is_complex:
        raise PreconditionError(
            f"inputs: the dtype of '{name}' must be one such as float32, bfloat16, int64 or bool, got {dtype!r}"
        )
    return found


def _dimensions(name: str, dynamic: Any, value: Any) -> dict[int, str]:
    rank = value.dim() if isinstance(value, Tensor) else 0
    good = isinstance(dynamic, Mapping) and all(
        type(dim) is int and -rank <= dim < rank and isinstance(label, str) for dim, label in dynamic.items()
    )
    if not good:
        raise PreconditionError(
            f"inputs: `dynamic` of '{name}' must map its {rank} dimensions to names, such as {{0: batch}}, got {dynamic!r}"
        )
    return {dim % rank: label for dim, label in dynamic.items()}
