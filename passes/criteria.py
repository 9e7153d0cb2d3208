"""Criteria: how much each slice of the members of a coupling group matters, before members are combined.

A criterion gives one score vector per member it can judge; an empty list means that it can judge none of them. The
formulas follow docs/methods/depgraph.md. `importance` puts criteria, reductions and normalisers together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.groups import CouplingGroup, Member
from ..graph.operators import arg, base_name, bias_of, layer_of, weight_of
from ..graph.program import Program, tensor_identity
from .slices import gathered, power_sums, slice_rows, slice_sums, wide


@dataclass(frozen=True)
class Scoring:
    """What criteria read, by tensor name.

    Attributes:
        tensors: Parameters and buffers.
        gradients: Calibration gradients, summed over the samples; for the criteria in `NEEDS_GRADIENTS`.
        squared_gradients: Means over the samples of the squared gradients; for those in `NEEDS_SQUARED_GRADIENTS`.
        activations: Mean magnitude of what layers read, by weight and dimension; for ``activation``.
        layer_outputs: ``(weight name, dimension)`` of what convolutions and linear layers produce; for ``fpgm``.
        layer_inputs: The same of what they read; for ``group-fpgm``.
        batch_norm_scales: Names of the batch norms' weights; for ``bn-scale``.
        seed: For ``random``.
        losses: Of the calibration samples that were looked at.
        used: Which of them counted.
        layer_biases: Names of the biases of convolutions and linear layers; for ``obdc``.
    """

    tensors: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squared_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    layer_outputs: frozenset[tuple[str, int]] = frozenset()
    layer_inputs: frozenset[tuple[str, int]] = frozenset()
    batch_norm_scales: frozenset[str] = frozenset()
    seed: int = 0
    losses: tuple[float, ...] = ()
    used: tuple[int, ...] = ()
    layer_biases: frozenset[str] = frozenset()
    _powers: dict[tuple[str, int], tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    def weight(self, member: Member) -> Tensor:
        """Return a member's tensor, detached, in at least float32."""
        return wide(self.tensors[member.name].detach())

    def powers(self, name: str, p: int) -> tuple[Tensor, ...]:
        """Return `power_sums` of the tensor ``name``, computed once: it is a member of a group in every dimension."""
        if (name, p) not in self._powers:
            self._powers[name, p] = power_sums(self.tensors[name], p)
        return self._powers[name, p]


Criterion = Callable[[Scoring, CouplingGroup, Sequence[Member]], list[Tensor]]


def magnitude(p: int) -> Criterion:
    """Score a slice by the sum of ``|w| ** p``, without a root (Pruning Filters for Efficient ConvNets, 1608.08710)."""

    def score(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
        return [gathered(scoring.powers(m.name, p)[m.dim], m) for m in members]

    return score


def random(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score by uniform random numbers, the same for the same seed and group."""
    generator = torch.Generator().manual_seed((scoring.seed * 1_000_003 + _stable_hash(group.name)) % (1 << 63))
    return [torch.rand(group.size, generator=generator)]


def _stable_hash(text: str) -> int:
    # The built-in hash of a string differs from process to process.
    value = 0
    for char in text:
        value = (value * 131 + ord(char)) % (1 << 61)
    return value


def taylor(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score a slice by ``sum |w * dL/dw|``: first-order change of the loss, element by element (1906.10771)."""
    found = [m for m in members if m.name in scoring.gradients]
    return [slice_sums((scoring.weight(m) * scoring.gradients[m.name]).abs(), m) for m in found]


def taylor_multivariable(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score a slice by ``|sum w * dL/dw|``: the loss change of removing the slice as a whole."""
    found = [m for m in members if m.name in scoring.gradients]
    return [slice_sums(scoring.weight(m) * scoring.gradients[m.name], m).abs() for m in found]


def taylor_squared(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score a slice of a matrix or filter by ``sum (w * dL/dw)**2``, of a vector such as a norm's by ``|w * dL/dw|``.

    The form in the published code of Diff-Pruning (2305.10924), whose paper has that of `taylor`.
    """
    found = [m for m in members if m.name in scoring.gradients]
    products = [(m, scoring.weight(m) * scoring.gradients[m.name]) for m in found]
    return [slice_sums(product.abs() if product.dim() < 2 else product**2, m) for m, product in products]


def hessian(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score a slice by ``sum w**2 * h`` with ``h`` the mean over samples of ``(dL_i/dw)**2``.

    ``h`` is the Fisher estimate of the diagonal of the Hessian in Optimal Brain Damage (LeCun et al., 1989). It needs
    one gradient per sample: the square of a batch's gradient is not the mean of the squares.
    """
    found = [m for m in members if m.name in scoring.squared_gradients]
    return [slice_sums(scoring.weight(m) ** 2 * scoring.squared_gradients[m.name], m) for m in found]


def obdc(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score an output slice by ``sum w**2 * (h + 1e-10)``, with ``h`` as in `hessian`.

    Only what convolutions and linear layers produce is judged, with their biases if those count (C-OBD in EigenDamage,
    1905.05934). There ``h`` is the diagonal of the Fisher matrix, of labels drawn from the model's own distribution: that
    is a matter of the loss, which `fisher.fisher_calibration` makes.
    """
    made = [m for m in members if (m.name, m.dim) in scoring.layer_outputs or m.name in scoring.layer_biases]
    found = [m for m in made if m.name in scoring.squared_gradients]
    # Without the constant all filters of a layer that no gradient reaches would be equal; with it the smallest go.
    return [slice_sums(scoring.weight(m) ** 2 * (scoring.squared_gradients[m.name] + 1e-10), m) for m in found]


def fpgm(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score an output slice by the sum of its distances to the others, ``sum_j ||w_k - w_j||_2``.

    A filter near the geometric median of its layer can be replaced by the others. Only what convolutions and linear
    layers produce is judged (Filter Pruning via Geometric Median, 1811.00250).
    """
    return _distances(scoring, [m for m in members if (m.name, m.dim) in scoring.layer_outputs])


def group_fpgm(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score every slice of a convolution or linear layer, of what reads the index too, as `fpgm` does filters."""
    layers = scoring.layer_outputs | scoring.layer_inputs
    return _distances(scoring, [m for m in members if (m.name, m.dim) in layers])


def _distances(scoring: Scoring, members: Sequence[Member]) -> list[Tensor]:
    # In float64, since the fast form of the distance subtracts numbers that are nearly equal.
    rows = (slice_rows(scoring.weight(m).double(), m) for m in members)
    return [torch.cdist(r, r).sum(1) for r in rows]


def bn_scale(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score an index by ``|gamma|`` of the batch norms it passes through (Network Slimming, 1708.06519)."""
    return [slice_sums(scoring.weight(m).abs(), m) for m in members if m.name in scoring.batch_norm_scales]


def activation(scoring: Scoring, group: CouplingGroup, members: Sequence[Member]) -> list[Tensor]:
    """Score an index by the mean of ``|x|`` that the layers behind it read there, on calibration batches."""
    found = [m for m in members if (m.name, m.dim) in scoring.activations]
    return [gathered(scoring.activations[m.name, m.dim], m) for m in found]


CRITERIA: dict[str, Criterion] = {
    "activation": activation,
    "bn-scale": bn_scale,
    "fpgm": fpgm,
    "group-fpgm": group_fpgm,
    "hessian": hessian,
    "magnitude-l1": magnitude(1),
    "magnitude-l2": magnitude(2),
    "obdc": obdc,
    "random": random,
    "taylor": taylor,
    "taylor-multivariable": taylor_multivariable,
    "taylor-squared": taylor_squared,
}
NEEDS_SQUARED_GRADIENTS = frozenset({"hessian", "obdc"})
NEEDS_GRADIENTS = NEEDS_SQUARED_GRADIENTS | {"taylor", "taylor-multivariable", "taylor-squared"}

# What it means when a criterion judges no member of a group.
UNJUDGED = {
    "activation": "no convolution or linear layer with a weight of its own reads it",
    "bn-scale": "no batch norm with a weight carries it",
    "fpgm": "no weight of a convolution or linear layer produces it",
    "group-fpgm": "no weight of a convolution or linear layer produces or reads it",
    "obdc": "no weight of a convolution or linear layer that received a gradient produces it",
}


# ---------------------------------------------------------------------- what weights are to the layers that read them


def layer_sides(program: Program) -> tuple[frozenset[tuple[str, int]], frozenset[tuple[str, int]]]:
    """Return what convolutions, linear layers and products with a parameter produce, and what they read.

    Both as ``(weight name, dimension)``. Weights that are computed (weight normalisation) are not listed: no parameter of
    theirs is the layer's weight.
    """
    outputs, inputs = set(), set()
    names = first_names(program)
    for node in program.nodes:
        layer, weight = layer_of(node), weight_of(node)
        if layer is None or not isinstance(weight, Node) or weight.op != "get_attr":
            continue
        rank = weight.meta["val"].dim()
        if rank >= 2:
            outputs.add((names[str(weight.target)], layer.outputs % rank))
            inputs.add((names[str(weight.target)], layer.inputs % rank))
    return frozenset(outputs), frozenset(inputs)


def layer_biases(program: Program) -> frozenset[str]:
    """Return the names of the biases of all convolutions and linear layers."""
    names = first_names(program)
    found = (bias_of(node) for node in program.nodes)
    return frozenset(names[str(b.target)] for b in found if isinstance(b, Node) and b.op == "get_attr")


def batch_norm_scales(program: Program) -> frozenset[str]:
    """Return the names of the weights of all batch norms."""
    weights = (arg(node, 1, "weight") for node in program.nodes if base_name(node).endswith("batch_norm"))
    names = first_names(program)
    return frozenset(names[str(w.target)] for w in weights if isinstance(w, Node) and w.op == "get_attr")


def first_names(program: Program) -> dict[str, str]:
    """Return for each tensor the name under which the coupling analysis lists it: the first of a tied one."""
    tensors = program.tensors()
    first: dict[Hashable, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor_identity(tensor), name)
    return {name: first[tensor_identity(tensor)] for name, tensor in tensors.items()}


__all__ = [
    "CRITERIA",
    "NEEDS_GRADIENTS",
    "NEEDS_SQUARED_GRADIENTS",
    "UNJUDGED",
    "Criterion",
    "Scoring",
    "batch_norm_scales",
    "layer_biases",
    "layer_sides",
]
