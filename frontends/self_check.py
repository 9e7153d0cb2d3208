"""The self-check of a module: seeded inputs that need no stored values, and fingerprints of its outputs.

Write-back compares a module with its Program on inputs of another batch size; a saved model carries a self-check.
Both describe each input by shape, dtype, range and seed, as plain data, so that nothing but JSON has to be kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..graph.compare import dynamic_sizes, example_like
from ..graph.errors import ArtifactError, first_line
from ..graph.program import Program

logger = logging.getLogger(__name__)

SECOND_SEED = 20_000

# How far the figures of two fingerprints may be apart, relative to the largest magnitude.
FINGERPRINT_TOLERANCE = 1e-3

# Values of each output that a self-check keeps, for machines whose kernels round differently.
SAMPLES = 32


class NotDescribable(ValueError):
    """An input is of a type that a recipe cannot describe."""


@dataclass(frozen=True)
class TensorRecipe:
    """How to make one input tensor.

    Attributes:
        shape: Of the tensor.
        dtype: Name of the dtype, without ``torch.``.
        low: Least value.
        high: Largest value (whole numbers and booleans include it).
        seed: Of a generator of its own.
    """

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    seed: int

    @classmethod
    def like(cls, example: Tensor, seed: int) -> TensorRecipe:
        """Describe random values in the range of ``example``; a constant one of floats is widened by 1."""
        values = example.detach()
        low, high = (0.0, 0.0) if not values.numel() else _range(values)
        if values.is_floating_point() and low == high:
            low, high = low - 1, high + 1
        name = str(example.dtype).removeprefix("torch.")
        return cls(tuple(example.shape), name, low, high, seed)

    def make(self) -> Tensor:
        """Return the tensor, on the CPU. Uniform, since uniform numbers have the same bits on every machine."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {self.dtype!r}")
        if dtype.is_floating_point:
            unit = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            return (self.low + (self.high - self.low) * unit).to(dtype)
        return torch.randint(int(self.low), int(self.high) + 1, self.shape, generator=generator).to(dtype)


def _range(values: Tensor) -> tuple[float, float]:
    if values.is_complex():
        raise NotDescribable("complex inputs")
    finite = values.to(torch.float64)
    finite = finite[finite.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)


def describe(tree: Any, seed: int = 0) -> Any:
    """Return ``tree`` (dicts, lists, tuples, tensors, numbers, strings, None) as plain data with recipes for tensors.

    Raises:
        NotDescribable: The tree holds something else.
    """
    counter = iter(range(seed, seed + 1_000_000))

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": asdict(TensorRecipe.like(value, next(counter)))}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: walk(item) for key, item in value.items()}}
        if type(value) in (list, tuple):
            return {type(value).__name__: [walk(item) for item in value]}
        raise NotDescribable(f"an input of type {type(value).__name__}")

    return walk(tree)


def realise(data: Any) -> Any:
    """Return the inputs that `describe` described.

    Raises:
        ValueError: The data is not what `describe` writes.
    """
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("a described input must have exactly one kind")
    ((kind, value),) = data.items()
    if kind == "tensor":
        return TensorRecipe(**{**value, "shape": tuple(value["shape"])}).make()
    if kind == "value":
        return value
    if kind == "dict":
        return {key: realise(item) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [realise(item) for item in value]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown kind of input {kind!r}")


def second_inputs(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return other inputs like the example's, with another batch size where the batch is dynamic."""
    batches = {spec.shape[0] for spec in program.inputs if spec.shape}
    sizes = {label: size + 1 for label, size in dynamic_sizes(program).items() if label in batches}
    return pytree.tree_unflatten(example_like(program, sizes, SECOND_SEED), program.in_spec)


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Run ``module`` in evaluation mode, without gradients and without moving the global random state."""
    modes = [(m, m.training) for m in module.modules() if m.training]
    try:
        for each, _mode in modes:
            each.training = False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for each, mode in modes:
            each.training = mode


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a module's result, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Describe one output: shape, dtype, norm, some values, and a hash of all, rounded to 1e-4 of the largest."""
    values = tensor.detach().to("cpu", torch.float64).reshape(-1)
    finite = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    rounded = torch.round(finite / (scale * 1e-4)).to(torch.int32) if scale else finite.to(torch.int32)
    picks = torch.linspace(0, max(finite.numel() - 1, 0), min(SAMPLES, finite.numel())).long()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": float(finite.norm()),
        "largest": scale,
        "values": finite[picks].tolist(),
        "sha256": hashlib.sha256(rounded.numpy().tobytes()).hexdigest(),
    }


def fingerprint_deviation(got: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    """Return how far two fingerprints are apart, relative to the largest magnitude of ``want``; 0 if the hashes agree.

    The hash alone would not do: a value on the edge between two roundings falls on either side on another machine.
    Infinite where shapes or dtypes differ.
    """
    if got["shape"] != want["shape"] or got["dtype"] != want["dtype"] or len(got["values"]) != len(want["values"]):
        return float("inf")
    if got["sha256"] == want["sha256"]:
        return 0.0
    scale = max(float(want["largest"]), 1e-30)
    apart = [abs(a - b) / scale for a, b in zip(got["values"], want["values"], strict=True)]
    return max(*apart, abs(got["norm"] - want["norm"]) / max(float(want["norm"]), 1e-30), 0.0)


# ---------------------------------------------------------------------- of a saved module


def record_self_check(model: nn.Module, inputs: Any, note: str) -> dict[str, Any]:
    """Run ``model`` and return what `run_self_check` compares with, or why there is nothing: ``skipped``.

    Args:
        model: In any mode, on any device.
        inputs: As `describe` described them; None where it could not.
        note: Why ``inputs`` is None.
    """
    if inputs is None:
        return {"skipped": f"the inputs cannot be described: {note}"}
    outputs = _run(model, inputs)
    if not outputs:
        return {"skipped": "the module returns no tensors"}
    return {"inputs": inputs, "outputs": [fingerprint(t) for t in outputs]}


def run_self_check(model: nn.Module, check: Mapping[str, Any], source: str) -> None:
    """Run ``model`` on the recorded inputs and compare its outputs with the recorded ones.

    A check that was not recorded is logged as a warning: nothing is known about what the module computes.

    Args:
        model: Freshly loaded.
        check: What `record_self_check` returned.
        source: Where it was loaded from.

    Raises:
        ArtifactError: The check is damaged, the module does not run, or an output differs.
    """
    if "skipped" in check:
        logger.warning("the outputs of %s were not checked after loading: %s", source, check["skipped"])
        return
    name = type(model).__name__
    try:
        got, want = [fingerprint(t) for t in _run(model, check["inputs"])], check["outputs"]
        problem = _difference(got, want)
    except (KeyError, TypeError, ValueError) as err:
        raise ArtifactError(f"the self-check of {source} is damaged: {type(err).__name__}: {err}") from err
    except (RuntimeError, IndexError, AssertionError, AttributeError) as err:
        raise ArtifactError(
            f"{name} from {source} does not run on the recorded inputs: {first_line(err)}; {_ADVICE}"
        ) from err
    if problem:
        raise ArtifactError(
            f"{name} from {source} does not compute what it computed when it was saved: {problem}; {_ADVICE}"
        )


_ADVICE = (
    "install the versions of its library and of torch that its record names under 'versions', or load it with "
    "self_check=False and judge for yourself"
)


def _difference(got: Sequence[Mapping[str, Any]], want: Sequence[Mapping[str, Any]]) -> str:
    """Return which output differs and by how much, in words; nothing if none does."""
    if len(got) != len(want):
        return f"it returns {len(got)} tensors, expected {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a["shape"] != b["shape"] or a["dtype"] != b["dtype"]:
            return f"output {i} is {a['dtype']} {a['shape']}, expected {b['dtype']} {b['shape']}"
        if (apart := fingerprint_deviation(a, b)) > FINGERPRINT_TOLERANCE:
            return (
                f"output {i} is off by {apart:.1e} of its largest value, {FINGERPRINT_TOLERANCE:.0e} is allowed "
                f"(norm {a['norm']:.6g}, expected {b['norm']:.6g})"
            )
    return ""


def _run(model: nn.Module, described: Any) -> list[Tensor]:
    inputs = realise(described)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (inputs["args"], inputs["kwargs"]))
    with quiet(model):
        return tensors_of(model(*args, **kwargs))
