"""ONNX files that share one file of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "weights.data"
# Of a page, so that a runtime can map a tensor; small ones only as kernels like it.
PAGE, LINE, LARGE = 4096, 64, 1 << 20


def share_weights(sources: Mapping[str, Path], folder: Path) -> dict[str, int]:
    """Write ONNX models anew as ``folder/NAME.onnx``, with equal tensors stored once in ``folder/weights.data``.

    Args:
        sources: Model files by name, with external data beside them.
        folder: Of the new files.

    Returns:
        Bytes of ``all`` models' weights and of those ``stored``.
    """
    import onnx_ir as ir

    places: dict[str, tuple[int, int]] = {}
    total = 0
    with (folder / WEIGHTS_FILE).open("wb") as data:
        for name, source in sources.items():
            model = ir.load(source)
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if not isinstance(tensor, ir.ExternalTensor):
                    continue  # small ones are in the file of the graph, where shape inference reads them
                content = tensor.tobytes()
                key = hashlib.sha256(content).hexdigest()
                total += len(content)
                if key not in places:
                    places[key] = (_align(data, len(content)), len(content))
                    data.write(content)
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS_FILE, offset, length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=folder
                )
            ir.save(model, folder / f"{name}.onnx")
    return {"all": total, "stored": sum(length for _, length in places.values())}


def _align(data: Any, length: int) -> int:
    step = PAGE if length >= LARGE else LINE
    data.write(b"\0" * (-data.tell() % step))
    return data.tell()
