"""Distillation: the loss of a smaller program with what a teacher computes from the same inputs.

    loss = (1 - weight) * loss(student) + weight * (distance(outputs) + mean distance of the features)

Outputs are compared as they are. Features are values inside the graph: where the student lost channels, the teacher's
remaining ones are compared, those that the removal record says the student kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from ..graph.depgraph import check_keep, depgraph
from ..graph.errors import PreconditionError, module_path, unknown
from ..graph.program import Program
from ..graph.resize import RemovalRecord
from ..graph.rules import Resizer
from ..graph.rules.base import is_tensor
from .watched import Watched

Distance = Callable[[Tensor, Tensor, float], Tensor]


def _mean_square(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return nn.functional.mse_loss(student.float(), teacher.float())


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence of softened classes in the last dimension, times T squared (Hinton et al., 1503.02531)."""
    logs = nn.functional.log_softmax(student.float() / temperature, -1)
    wanted = nn.functional.log_softmax(teacher.float() / temperature, -1)
    each = nn.functional.kl_div(logs, wanted, reduction="none", log_target=True).sum(-1)
    return each.mean() * temperature**2


DISTANCES: dict[str, Distance] = {"kl": _divergence, "mse": _mean_square}


class Distilled:
    """A loss with a teacher: ``Distilled(...)(student, batch)``, where the student is a `Watched`.

    Args:
        loss: Of the student alone: ``loss(module, batch)``.
        teacher: Evaluated on whatever inputs the loss gives to the student.
        weight: Of the teacher's part, in (0, 1].
        distance: Between outputs: a key of `DISTANCES`. Features are compared by their mean square.
        temperature: For ``kl``.
        kept: For each feature of the teacher the kept indices by dimension.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        teacher: Watched,
        weight: float,
        distance: str = "mse",
        temperature: float = 1.0,
        kept: Sequence[Mapping[int, Tensor]] = (),
    ) -> None:
        self.loss, self.teacher, self.weight = loss, teacher, weight
        self.distance, self.temperature, self.kept = DISTANCES[distance], temperature, kept

    def __call__(self, student: Any, batch: Any) -> Tensor:
        """Return the scalar loss of a batch.

        Raises:
            PreconditionError: The loss does not call the student, or nothing can be compared.
        """
        student.calls.clear()
        own = self.loss(student, batch)
        if not student.calls:
            raise PreconditionError("the loss does not call the module that it is given, so no teacher can be compared")
        parts = [self._distance(*call) for call in student.calls]
        student.calls.clear()
        return (1 - self.weight) * own + self.weight * torch.stack(parts).mean()

    def _distance(self, inputs: Any, result: Any, features: tuple[Tensor, ...]) -> Tensor:
        args, kwargs = inputs
        device = next((v.device for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)), None)
        if device is not None and any(p.device != device for p in self.teacher.parameters()):
            self.teacher.to(device)
        with torch.no_grad():
            wanted = self.teacher(*args, **kwargs)
        wanted_features = self.teacher.calls.pop()[2]
        pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(wanted), strict=True)
        outputs = [
            self.distance(s, t, self.temperature) for s, t in pairs if isinstance(s, Tensor) and s.is_floating_point()
        ]
        if not outputs:
            raise PreconditionError(
                "the student has no floating-point output that could be compared with the teacher's"
            )
        total = torch.stack(outputs).mean()
        if features:
            cut = (_cut(t, dims) for t, dims in zip(wanted_features, self.kept, strict=True))
            inner = [_mean_square(s, t, 1.0) for s, t in zip(features, cut, strict=True)]
            total = total + torch.stack(inner).mean()
        return total


def feature_nodes(program: Program, names: Sequence[str]) -> list[str]:
    """Return the nodes that ``names`` mean: a node of that name, or the last value of the module of that name.

    Raises:
        PreconditionError: There is neither, or the value is no floating-point tensor.
    """
    found = []
    for name in names:
        inside = [n for n in program.nodes if n.op == "call_function" and _is_of(n, name)]
        chosen = next((n for n in program.nodes if n.name == name), inside[-1] if inside else None)
        if chosen is None:
            known = {module_path(n)[0] for n in program.nodes} - {""}
            raise PreconditionError(unknown(f"features: {program.name} has no module or node", name, known))
        value = chosen.meta.get("val")
        if not is_tensor(value) or not value.is_floating_point():
            raise PreconditionError(f"features: %{chosen.name} of {name!r} is no floating-point tensor")
        found.append(chosen.name)
    return found


def _is_of(node: Node, module: str) -> bool:
    path = module_path(node)[0]
    return path == module or path.startswith(f"{module}.")


def kept_dimensions(original: Program, record: RemovalRecord, nodes: Sequence[str]) -> list[dict[int, Tensor]]:
    """Return for each node of the original which indices the removal left, by dimension; int64.

    Args:
        original: As it was before the removals.
        record: Of all of them.
        nodes: Names.
    """
    graph = depgraph(original)
    resizer = Resizer(graph.analysis, check_keep(graph, {name: cut.kept for name, cut in record.groups.items()}))
    found = {node.name: node for node in original.nodes}
    kept = [[resizer.kept(axis) for axis in resizer.of(found[name])] for name in nodes]
    return [
        {dim: torch.from_numpy(np.asarray(indices)) for dim, indices in enumerate(dims) if indices is not None}
        for dims in kept
    ]


def _cut(value: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, indices in dims.items():
        value = value.index_select(dim, indices.to(value.device))
    return value
