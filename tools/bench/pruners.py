"""From a module to a pruned one: by graphwright and by Torch-Pruning, with the CPU seconds of each part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ...graph.cost import parameter_count
from ...graph.depgraph import depgraph
from ...graph.program import Program
from ...passes.base import Context
from ...passes.remove_channels import RemoveChannels
from .architectures import Subject
from .timing import Parts, Stopwatch

RATIO = 0.5
PROJECTIONS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")


def ours(capture: Callable[[], Program]) -> tuple[Parts, nn.Module]:
    """Remove half of every group with graphwright; head dims too, as Torch-Pruning does when it is told the heads.

    Args:
        capture: Makes the program: by ``torch.export``, or from the cache.

    Returns:
        Parts ``capture``, ``analysis`` (axes and groups), ``plan`` (costs and scores), ``resize`` (ranking, cutting,
        verification) and ``total``, with the counts ``nodes``, ``groups`` and ``parameters``; and the smaller module.
    """
    watch = Stopwatch()
    program = capture()
    watch.lap("capture")
    context = Context(progress=lambda what, done, total: watch.lap("plan") if what == "scoring" else None)
    groups = context.analysis(depgraph, program).groups
    watch.lap("analysis")
    nodes = len(program.graph_module.graph.nodes)
    RemoveChannels(ratio=RATIO, head_dim_ratio=RATIO)(program, context)
    watch.lap("resize")
    module = program.module()
    sizes = {"nodes": nodes, "groups": len(groups), "parameters": parameter_count(module)}
    return {**watch.parts, "total": watch.total, **sizes}, module


def theirs(subject: Subject) -> tuple[Parts, nn.Module]:
    """Remove half of every group with Torch-Pruning, in place.

    Returns:
        Parts ``init`` (construction of the pruner, which builds its graph), ``step`` and ``total``, with the count
        ``parameters``; and the module.
    """
    import torch_pruning

    modules = dict(subject.model.named_modules())
    heads = {m: n for name, m in modules.items() if (n := _heads(subject, modules, name))}
    watch = Stopwatch()
    with warnings.catch_warnings():
        # Of parameters that no layer owns, which it prunes along their last dimension, as is right here.
        warnings.simplefilter("ignore", UserWarning)
        pruner = torch_pruning.pruner.BasePruner(
            subject.model,
            subject.inputs,  # pyright: ignore[reportArgumentType]
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[modules[name] for name in subject.ignored],
            num_heads=heads,
        )
        watch.lap("init")
        pruner.step()
        watch.lap("step")
    return {**watch.parts, "total": watch.total, "parameters": parameter_count(subject.model)}, subject.model


def runs(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Say whether a pruned module computes something finite: ``runs``, ``not finite`` or the error's type."""
    try:
        with torch.no_grad():
            out = pytree.tree_leaves(model(**inputs))
    # Whatever a broken module raises is the finding.
    except Exception as err:
        return f"raises {type(err).__name__}"
    tensors = [v for v in out if isinstance(v, Tensor) and v.is_floating_point()]
    return "runs" if tensors and all(bool(torch.isfinite(v).all()) for v in tensors) else "not finite"


def _heads(subject: Subject, modules: dict[str, nn.Module], name: str) -> int:
    """Return the number of heads that a projection to queries, keys or values serves; 0 for any other module."""
    path, _, leaf = name.rpartition(".")
    if leaf not in PROJECTIONS or not isinstance(modules[name], nn.Linear):
        return 0
    return int(getattr(modules[path], "heads", 0)) or subject.heads
