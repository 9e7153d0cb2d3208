"""What a recipe says, as frozen dataclasses: the keys, types and defaults of the file are these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml

from ..graph.errors import GraphwrightError
from ..passes.options import plain

VERSION = 1
OLDEST_OPSET = 18
# Sections that are written `true` for their defaults and `false` for off.
SWITCHES = (("export", "onnx"), ("export", "torchscript"), ("measure",))


class RecipeError(GraphwrightError):
    """A recipe does not exist, is malformed, or asks for something unknown."""


@dataclass(frozen=True, kw_only=True)
class InputTensor:
    """An example input.

    Attributes:
        shape: Sizes; at least 2 where a dimension is dynamic.
        dtype: Floats are normal unless bounds are given; whole numbers need `high`.
        low: Smallest value.
        high: Values stay below it, such as the size of a vocabulary.
        value: Every element, instead of drawing.
        dynamic: Names of the dimensions that vary.
    """

    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None
    value: bool | int | float | str | None = None
    dynamic: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Factory:
    """A callable of the user's own code, or of graphwright's.

    Attributes:
        factory: ``package.module:callable``; modules in the working directory are found.
        options: Keyword arguments that it is called with.
    """

    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """An ONNX export.

    Attributes:
        opset: ONNX operator set; null lets the exporter choose by what the graph holds.
        fp16: Convert weights and computation to half precision.
        providers: ONNX Runtime execution providers to run on, best first; null takes the best that is there.
        fp16_tolerance: Largest allowed difference of the half precision file; `Check.tolerance` is for the file before.
        original: Export the model before the passes as well, to compare speed and samples.
    """

    opset: int | None = None
    fp16: bool = False
    fp16_tolerance: float = 2e-2
    providers: tuple[str, ...] | None = None
    original: bool = True

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset < OLDEST_OPSET:
            raise ValueError(f"opset must be at least {OLDEST_OPSET}, got {self.opset}")


@dataclass(frozen=True, kw_only=True)
class TorchscriptExport:
    """A TorchScript export; it has no options."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to export; null where nothing is."""

    onnx: OnnxExport | None = None
    torchscript: TorchscriptExport | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """How exports are compared with the program.

    Attributes:
        tolerance: Largest allowed difference of an output, relative to its largest magnitude; null takes what fits the
            dtype (1e-4 in float32).
        second_shape: Compare at other sizes of the dynamic dimensions too: true (batch plus 1, others doubled), false,
            or the sizes by the dimension's name.
    """

    tolerance: float | None = None
    second_shape: bool | Mapping[str, int] = True

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How latency is measured.

    Attributes:
        runs: Timed runs of each model, interleaved; the median counts.
        threads: Threads of PyTorch and ONNX Runtime; null takes what they choose.
        batch: Size of dimension 0 of the inputs, which must be dynamic; null takes the example's.
    """

    runs: int = 20
    threads: int | None = 1
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("runs", "threads", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, wholly described.

    Attributes:
        model: ``builtin:NAME``, a directory of a library, of a run or of a saved model, a GGUF file,
            ``package.module:factory``, or a hub name.
        version: Of the recipe format.
        dtype: Convert the model's floating-point tensors, and inputs, to this; null leaves them.
        random_weights: Build from the configuration alone, where a directory has no weights.
        seed: Of everything random that has no seed of its own.
        inputs: Example inputs by name, tensors or constants, in place of all of the model's own.
        dynamic: Names of dimensions that may vary, by input and dimension; null is the batch alone.
        calibration: For criteria that need gradients. The factory returns ``(loss, batches)``, where
            ``loss(program, batch)`` is a scalar tensor, or ``(loss, batches, split)``, where ``split(batch)`` gives the
            samples of a batch.
        training: For `train-weights`. The factory returns ``(loss, batches)`` as that of `calibration` does; the batches are
            gone through again and again, such as those of a shuffling `DataLoader`.
        sampling: For passes that learn on sampling runs. The factory returns ``sample(denoise, generator)``, which makes one
            run and calls ``denoise`` as the model is called.
        passes: In order.
        export: What to export.
        check: How exports are compared.
        samples: Pictures by the original and the rewritten model for the report. The factory returns
            ``draw(program, models, folder, progress)``: see `graphwright.tools.samples`.
        measure: How to measure latency; null to leave it out.
        name: The recipe's short name; not a key of the file.
    """

    model: str
    version: int = VERSION
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    random_weights: bool = False
    seed: int = 0
    inputs: Mapping[str, InputTensor | bool | int | float | str | None] | None = None
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    calibration: Factory | None = None
    training: Factory | None = None
    sampling: Factory | None = None
    passes: tuple[Any, ...] = ()
    export: Export = field(default_factory=Export)
    check: Check = field(default_factory=Check)
    samples: Factory | None = None
    measure: Measure | None = field(default_factory=Measure)
    name: str = field(default="", init=False, compare=False)

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version must be {VERSION}, the one this release reads, got {self.version}")

    def to_data(self) -> dict[str, Any]:
        """Return plain data with every default filled in; `read_recipe` reads it back."""
        data = plain(replace(self, passes=()))
        data["passes"] = [{step.name: plain(step)} for step in self.passes]
        for *around, last in SWITCHES:
            section = data
            for key in around:
                section = section[key]
            if section[last] is None:
                section[last] = False
        ordered = {"version": data.pop("version"), **data}
        return ordered

    def to_yaml(self) -> str:
        """Return the YAML of `to_data`."""
        return yaml.safe_dump(self.to_data(), sort_keys=False, allow_unicode=True, width=100)
