"""Run an ONNX export on torch tensors, which stay on their device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph.errors import InputError
from ..graph.interface import check_labels, fits
from .artifacts import bind_inputs, check_tensor, read_manifest
from .onnx_runtime import CUDA, SHORT_NAMES, TENSORRT, open_session

KIND, PLAN_KIND, FORMAT_VERSION = "onnx", "onnx-plan", 1
MODEL_FILE, MANIFEST_FILE = "model.onnx", "manifest.json"

# Values of `onnx.TensorProto.DataType`, so that running needs no `onnx`.
ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.uint16: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.uint32: 12,
    torch.uint64: 13,
    torch.complex64: 14,
    torch.complex128: 15,
    torch.bfloat16: 16,
}


class OnnxRunner:
    """Calls an ONNX export in ONNX Runtime.

    The session reads the memory of the input tensors and hands out its outputs as torch tensors on its own device, without
    a copy: an output can be the input of another session that runs on the same device. On a GPU that takes IO binding; on
    the CPU NumPy's arrays, which are the same memory, take less time for each call.

    Attributes:
        manifest: What the export wrote about itself.
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order.
        session: The ``onnxruntime.InferenceSession``.
        device: Where the outputs are.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        providers: Sequence[str] | None = None,
        io_binding: bool | None = None,
        *,
        allow_fallback: bool = False,
        provider_options: Mapping[str, Mapping[str, Any]] | None = None,
        threads: int | None = None,
    ) -> None:
        """Open the export of a program in ``directory``.

        Args:
            directory: What ``export_onnx`` wrote.
            providers: Execution providers in order of preference (``"cuda"``, ``"cpu"``, or full names). None takes
                the best that work: TensorRT, CUDA, CPU.
            io_binding: Whether to bind inputs and outputs. None does so on a GPU, and for bfloat16, which NumPy has not.
                False on a GPU copies them through the memory of the CPU.
            allow_fallback: Accept a session without some requested provider.
            provider_options: Options by provider name, such as ``{"cuda": {"device_id": 1}}``.
            threads: For the operators of the CPU provider.

        Raises:
            ArtifactError: The directory holds no complete export, or ONNX Runtime does not load it.
            ProviderError: ONNX Runtime or a requested provider does not work.
            InputError: ``io_binding`` is False and an input or output is bfloat16.
        """
        manifest = read_manifest(directory, MANIFEST_FILE, KIND, FORMAT_VERSION)
        self._open(
            Path(directory) / MODEL_FILE,
            manifest,
            providers,
            io_binding,
            allow_fallback=allow_fallback,
            provider_options=provider_options,
            threads=threads,
        )

    @classmethod
    def of_file(
        cls, file: Path, facts: Mapping[str, Any], providers: Sequence[str] | None = None, **options: Any
    ) -> OnnxRunner:
        """Open one model file whose inputs and outputs ``facts`` describes, as a manifest does; see `__init__`."""
        runner = cls.__new__(cls)
        runner._open(file, facts, providers, **options)
        return runner

    def _open(
        self,
        file: Path,
        facts: Mapping[str, Any],
        providers: Sequence[str] | None,
        io_binding: bool | None = None,
        *,
        allow_fallback: bool = False,
        provider_options: Mapping[str, Mapping[str, Any]] | None = None,
        threads: int | None = None,
    ) -> None:
        self.manifest = facts
        self.input_names: tuple[str, ...] = tuple(entry["name"] for entry in self.manifest["inputs"])
        self.output_names: tuple[str, ...] = tuple(entry["name"] for entry in self.manifest["outputs"])
        self.session = open_session(
            file,
            providers,
            allow_fallback=allow_fallback,
            provider_options=provider_options,
            threads=threads,
        )
        self.device = _output_device(self.providers, provider_options or {})
        arrays = all(entry["dtype"] != "bfloat16" for entry in (*self.manifest["inputs"], *self.manifest["outputs"]))
        if io_binding is False and not arrays:
            raise InputError("NumPy has no bfloat16; open this export with io_binding=True")
        self.io_binding = self.device.type != "cpu" or not arrays if io_binding is None else io_binding

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that are active, in order of preference."""
        return tuple(self.session.get_providers())

    def __call__(self, *args: Tensor | np.ndarray, **kwargs: Tensor | np.ndarray) -> tuple[Tensor, ...]:
        """Run on tensors or arrays, in the order of `input_names` or by name; return those of `output_names`.

        Names with a dot are passed as ``runner(**{"cond.text": tensor})``.

        Raises:
            InputError: An input is missing, unknown, on a device that the session cannot read, or has another type,
                dtype or shape than the export declares.
        """
        given = bind_inputs("export", self.input_names, args, kwargs)
        inputs = {entry["name"]: _tensor(entry, given[entry["name"]]) for entry in self.manifest["inputs"]}
        self._check_shapes(inputs)
        return self.run(list(inputs.values()))

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on tensors of the dtypes and shapes that the manifest says, in the order of `input_names`.

        Raises:
            InputError: One is on a device that the session cannot read.
        """
        for name, tensor in zip(self.input_names, tensors, strict=True):
            if not tensor.is_cpu and tensor.device != self.device:
                raise InputError(
                    f"input '{name}' is on {tensor.device}, this session runs on {self.device}; move the tensor, or open "
                    "the export with the provider and device_id of that device"
                )
        return self._run_bound(tensors) if self.io_binding else self._run_arrays(tensors)

    def _check_shapes(self, inputs: Mapping[str, Tensor]) -> None:
        sizes: dict[str, int] = {}
        if all(fits(entry["shape"], inputs[entry["name"]].shape, sizes) for entry in self.manifest["inputs"]):
            return
        for entry in self.manifest["inputs"]:
            name, want = entry["name"], entry["shape"]
            got = list(inputs[name].shape)
            if len(want) != len(got) or any(isinstance(w, int) and w != g for w, g in zip(want, got, strict=True)):
                raise InputError(f"input '{name}' must have shape [{', '.join(map(str, want))}], got {got}")
        check_labels((e["name"], e["shape"], inputs[e["name"]].shape) for e in self.manifest["inputs"])

    def _run_bound(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().resolve_conj().resolve_neg().contiguous() for tensor in tensors]
        binding = self.session.io_binding()
        for name, tensor in zip(self.input_names, inputs, strict=True):
            _bind_input(binding, name, tensor)
        for name in self.output_names:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            # The session has streams of its own: what torch still computes must be there first.
            torch.cuda.current_stream(self.device).synchronize()
        binding.synchronize_inputs()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return tuple(_as_tensor(value) for value in binding.get_outputs())

    def _run_arrays(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        feed = {name: tensor.numpy(force=True) for name, tensor in zip(self.input_names, inputs, strict=True)}
        return tuple(torch.from_numpy(value) for value in self.session.run(self.output_names, feed))


def _tensor(entry: Mapping[str, Any], value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    return check_tensor(entry, value, "a tensor or an array")


def _output_device(providers: Sequence[str], provider_options: Mapping[str, Mapping[str, Any]]) -> torch.device:
    first = next((name for name in providers if name in (TENSORRT, CUDA)), None)
    if first is None:
        return torch.device("cpu")
    options = {SHORT_NAMES.get(name.lower(), name): value for name, value in provider_options.items()}
    return torch.device("cuda", int(options.get(first, {}).get("device_id", 0)))


def _bind_input(binding: Any, name: str, tensor: Tensor) -> None:
    """Let the session read the tensor's memory, which the caller keeps alive until the run ends."""
    device = tensor.device
    if tensor.numel() == 0:  # no memory to point at
        import onnxruntime

        empty = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(tensor.shape), ELEMENT_TYPES[tensor.dtype], device.type, device.index or 0
        )
        binding.bind_ortvalue_input(name, empty)
        return
    binding.bind_input(
        name, device.type, device.index or 0, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()
    )


def _as_tensor(value: Any) -> Tensor:
    """Return the session's output as a tensor over the same memory, which the tensor keeps alive."""
    tensor = torch.from_dlpack(value if hasattr(value, "__dlpack__") else value._ortvalue)
    # Older runtimes hand out booleans as bytes.
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" and tensor.dtype is not torch.bool else tensor
