"""The one place where the command line meets the backends: export a program, and run what was exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..graph.program import Program

Runner = Callable[..., Any]


def export_onnx(program: Program, directory: Path, **options: Any) -> dict[str, Any]:
    try:
        from ..backends.onnx_export import export_onnx as export
    except ModuleNotFoundError:
        return _temporary(program, directory)
    return vars(export(program, directory, **options))


def _temporary(program: Program, directory: Path) -> dict[str, Any]:
    args, kwargs = program.example_inputs()
    flat = [x for x in program.example if isinstance(x, torch.Tensor)]
    shapes = tuple({d: torch.export.Dim.DYNAMIC for d, n in enumerate(s.shape) if isinstance(n, str)} for s in program.inputs if s.is_tensor)

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gm = program.module()

        def forward(self, *xs):
            it = iter(xs)
            leaves = [next(it) if s.is_tensor else s.constant for s in program.inputs]
            return program.graph_module(*leaves)

    ep = torch.export.export(Flat(), tuple(flat), dynamic_shapes=(shapes,), strict=False)
    torch.onnx.export(ep, dynamo=True, verbose=False).save(str(directory / "model.onnx"))
    return {}


def onnx_runner(directory: Path, program: Program, threads: int | None = None) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = pytree.tree_flatten((args, kwargs))
        tensors = [x.numpy() for x in leaves if isinstance(x, torch.Tensor)]
        return session.run(None, dict(zip((i.name for i in session.get_inputs()), tensors, strict=True)))

    return run
