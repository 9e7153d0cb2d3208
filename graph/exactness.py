"""Is a removal equal to masking? Only where whatever is summed over the axis is zero when the axis is masked.

Masking sets the removed entries of every parameter to zero. A contraction with a weight is then exact by itself. A
sum over activations (query times key, a vector norm) is exact only if one operand is zero at the masked indices;
this module answers that by walking back from the sum, as far as the answer needs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from torch import nn
from torch.fx import Node

from .axes import Axis, leaves
from .operators import LAYERS, RECURRENT, arg, base_name, bias_of, weight_of
from .program import get_tensor
from .rules import Analysis
from .rules.base import is_tensor
from .rules.elementwise import ZERO_PRESERVING

# Past this many operators the answer is "not known to be zero", which labels more than it must and is never wrong.
MAX_DEPTH = 200

# Is a call zero, given which of its operands that carry the leaf are (at least one), and which carry it at all?
_Test = Callable[[Node, AbstractSet[Node], Sequence[Node]], bool]

_NORMS = {
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
    "rms_norm": (2, None),
}
_STRUCTURE = frozenset(
    "view reshape _unsafe_view flatten unflatten transpose t mT permute movedim unsqueeze squeeze cat slice narrow select unbind "
    "split chunk split_with_sizes tensor_split repeat repeat_interleave expand expand_as stack roll flip "
    "sum mean cumsum index index_select gather pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d linalg_vector_norm norm amax var std".split()
)


class Zeros:
    """Answers whether a node's value is zero at the masked indices of a leaf."""

    def __init__(self, analysis: Analysis, gm: object) -> None:
        self._analysis = analysis
        self._gm = gm
        self._memo: dict[tuple[Node, Axis], bool] = {}
        self._overwritten = _overwritten(analysis.dims)

    def any_zero(self, operands: Sequence[object], leaf: Axis) -> bool:
        """Whether one of ``operands`` is zero at the masked indices of ``leaf``."""
        return any(isinstance(o, Node) and self.zero(o, leaf) for o in operands)

    def zero(self, node: Node, leaf: Axis, depth: int = 0) -> bool:
        """Whether ``node`` is zero at the masked indices of ``leaf``; False where it has none or that is not known."""
        key = (node, leaf)
        if key not in self._memo:
            self._memo[key] = False
            self._memo[key] = depth < MAX_DEPTH and self._holds(node, leaf) and self._compute(node, leaf, depth + 1)
        return self._memo[key]

    def _holds(self, node: Node, leaf: Axis) -> bool:
        tensors = self._analysis.tensors(node)
        return any(found is leaf for dims in tensors for axis in dims for found in leaves(axis))

    def _compute(self, node: Node, leaf: Axis, depth: int) -> bool:
        if node in self._overwritten:
            return False
        if node.op == "get_attr":
            tensor = get_tensor(self._gm, str(node.target))  # type: ignore[arg-type]
            return isinstance(tensor, nn.Parameter)
        if node.op != "call_function":
            return False
        name = base_name(node)
        if name in _ZERO_FILLS:
            return True
        holders = [n for n in node.all_input_nodes if self._holds(n, leaf)]
        zero = {n for n in holders if self.zero(n, leaf, depth)}
        return bool(zero) and name in _TESTS and _TESTS[name](node, zero, holders)


def _any(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return True


def _all(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return len(zero) == len(holders)


def _first(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return node.args[0] in zero


def _second(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return node.args[1] in zero


def _third(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return node.args[2] in zero


def _sum(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return len(zero) == _tensor_count(node) and not any(_is_nonzero(a) for a in node.args[:2])


def _where(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return all(branch in zero or branch == 0 for branch in node.args[1:3])


def _pad(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    return node.args[0] in zero and not any(_is_nonzero(a) for a in node.args[2:])


def _power(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    """``x ** 2``, not ``2 ** x``, and not ``x ** y``, which is 1 where both are 0."""
    return node.args[0] in zero and isinstance(node.args[1], (int, float)) and node.args[1] > 0


def _layer(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    bias = bias_of(node)
    return weight_of(node) in zero and (not isinstance(bias, Node) or bias in zero)


def _norm(node: Node, zero: AbstractSet[Node], holders: Sequence[Node]) -> bool:
    name = base_name(node)
    weight, bias = _NORMS[name]
    scale = arg(node, weight, "weight")
    shift = None if bias is None else arg(node, bias, "bias")
    if isinstance(scale, Node) and scale in zero:
        return not isinstance(shift, Node) or shift in zero
    return name == "rms_norm" and node.args[0] in zero


_ZERO_FILLS = frozenset({"zeros", "new_zeros", "zeros_like"})
_TESTS: dict[str, _Test] = {
    **dict.fromkeys((*_STRUCTURE, *ZERO_PRESERVING, *RECURRENT, "getitem"), _all),
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys("mul multiply matmul mm bmm mv einsum outer ger __and__ logical_and bitwise_and".split(), _any),
    **dict.fromkeys(("div", "true_divide", "divide", "embedding"), _first),
    "where": _where,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "copy": _second,
    "pow": _power,
    **dict.fromkeys((name for name, layer in LAYERS.items() if layer.bias == (2, "bias")), _layer),
    **dict.fromkeys(_NORMS, _norm),
    "scaled_dot_product_attention": _third,
}


def _overwritten(nodes: Iterable[Node]) -> set[Node]:
    """Return nodes that are read after their memory was written through another node: a view, or what they view.

    An in-place operator that nobody goes round (``relu_`` on the result before it) is like any other operator.
    """
    order = {node: i for i, node in enumerate(nodes)}
    base: dict[Node, Node] = {}
    family: dict[Node, list[Node]] = {}
    writes: list[tuple[Node, Node]] = []
    for node in order:
        schema = getattr(node.target, "_schema", None)
        first = node.args[0] if node.op == "call_function" and node.args else None
        info = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
        alias = isinstance(first, Node) and (info is not None or node.target is operator.getitem)
        base[node] = base.get(first, first) if alias else node  # type: ignore[arg-type, assignment]
        family.setdefault(base[node], []).append(node)
        if alias and info is not None and info.is_write:
            writes.append((node, base[node]))
    return {
        node
        for write, root in writes
        for node in family[root]
        if node is not write and any(order.get(user, -1) > order[write] for user in node.users)
    }


def _tensor_count(node: Node) -> int:
    return sum(is_tensor(n.meta.get("val")) for n in node.all_input_nodes)


def _is_nonzero(value: object) -> bool:
    return isinstance(value, (int, float)) and value != 0
