"""Tensors made from nothing. Constant fills resize; what depends on positions freezes."""

from __future__ import annotations

from torch.fx import Node

from .base import Analysis, AxesRule, Dims, frozen, out_sizes, resize_shape
from .elementwise import COMPUTED, DRAWN

BY_VALUE = "counted or picked by value"
POSITIONS = "values made from positions"


def fill(an: Analysis, node: Node) -> Dims:
    """The same value everywhere: any index may go, but a computed size (batch times heads) is no literal to change."""
    return tuple(an.leaf(size, None if type(size) is int else COMPUTED) for size in out_sizes(node))


def positional(an: Analysis, node: Node) -> Dims:
    """``arange``, ``eye`` and relatives: the value at an index is the index."""
    return an.fresh(node.meta["val"], POSITIONS)


def random(an: Analysis, node: Node) -> Dims:
    """Random numbers: another size draws others."""
    for n in node.all_input_nodes:
        an.freeze_all(an.of(n), DRAWN)
    return an.fresh(node.meta["val"], DRAWN)


RULES_BY_OVERLOAD: dict[str, AxesRule] = {"aten.where.default": AxesRule(frozen(BY_VALUE))}

_BY_VALUE = (
    "histc bincount nonzero nonzero_numpy masked_select unique_consecutive _unique2 unique_dim searchsorted bucketize "
    "_is_all_true _is_any_true"
)

RULES: dict[str, AxesRule] = {
    **{name: AxesRule(fill, resize_shape(0, "size")) for name in ("zeros", "ones", "full", "empty", "empty_permuted")},
    **{name: AxesRule(fill, resize_shape(1, "size")) for name in ("new_zeros", "new_ones", "new_full", "new_empty")},
    **{
        name: AxesRule(positional)
        for name in ("arange", "linspace", "eye", "scalar_tensor", "tril_indices", "triu_indices")
    },
    **{name: AxesRule(random) for name in ("rand", "randn", "randint", "randperm", "normal_functional")},
    "meshgrid": AxesRule(frozen("positions")),
    "one_hot": AxesRule(frozen("classes")),
    **{name: AxesRule(frozen(BY_VALUE)) for name in _BY_VALUE.split()},
}
