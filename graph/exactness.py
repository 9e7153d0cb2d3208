"""Is a removal equal to masking? Only where whatever is summed over the axis is zero when the axis is masked.

Masking sets the removed entries of every parameter to zero. A contraction with a weight is then exact by itself. A
sum over activations (query times key, a vector norm) is exact only if one operand is zero at the masked indices;
this module answers that by walking back from the sum, as far as the answer needs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import nn
from torch.fx import Node

from .axes import Axis, leaves
from .program import get_tensor
from .rules import Analysis
from .rules.base import arg, is_tensor
from .rules.elementwise import ZERO_PRESERVING

# Past this many operators the answer is "not known to be zero", which labels more than it must and is never wrong.
MAX_DEPTH = 200

_ZERO_FILLS = frozenset("zeros new_zeros zeros_like".split())
_ALL = frozenset("add sub rsub".split())
_ANY = frozenset("mul multiply matmul mm bmm mv einsum outer ger __and__ logical_and bitwise_and".split())
_AFFINE = frozenset(
    "linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
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
        value = self._analysis.dims.get(node)
        if value is None:
            return False
        dims = value if not value or isinstance(value[0], Axis) else [a for v in value if v for a in v]
        return any(found is leaf for axis in dims for found in leaves(axis))

    def _compute(self, node: Node, leaf: Axis, depth: int) -> bool:
        if node in self._overwritten:
            return False
        if node.op == "get_attr":
            tensor = get_tensor(self._gm, str(node.target))  # type: ignore[arg-type]
            return isinstance(tensor, nn.Parameter)
        if node.op != "call_function":
            return False
        name = _name(node)
        if name in _ZERO_FILLS:
            return True
        holders = [n for n in node.all_input_nodes if self._holds(n, leaf)]
        zero = {n for n in holders if self.zero(n, leaf, depth)}
        if name in _ANY:
            return bool(zero)
        if not holders or not zero:
            return False
        first = node.args[0] in zero
        if name in _ALL:
            return len(zero) == _tensor_count(node) and not any(_is_nonzero(a) for a in node.args[:2])
        if name == "where":
            return all(branch in zero or branch == 0 for branch in node.args[1:3])
        if name in ("pad", "constant_pad_nd"):
            return first and not any(_is_nonzero(a) for a in node.args[2:])
        if name == "copy":
            return node.args[1] in zero
        if name in ("div", "true_divide", "divide"):
            return first
        if name == "pow":  # x ** 2, not 2 ** x, and not x ** y, which is 1 where both are 0
            return first and isinstance(node.args[1], (int, float)) and node.args[1] > 0
        if name in _AFFINE:
            bias = arg(node, 2, "bias")
            return node.args[1] in zero and (not isinstance(bias, Node) or bias in zero)
        if name in _NORMS:
            return self._norm_is_zero(node, name, zero)
        if name == "scaled_dot_product_attention":
            return node.args[2] in zero
        if name == "embedding":
            return first
        if name in _RECURRENT or name in ZERO_PRESERVING or name in _STRUCTURE or name == "getitem":
            return len(zero) == len(holders)
        return False

    def _norm_is_zero(self, node: Node, name: str, zero: set[Node]) -> bool:
        weight, bias = _NORMS[name]
        scale = arg(node, weight, "weight")
        shift = None if bias is None else arg(node, bias, "bias")
        if isinstance(scale, Node) and scale in zero:
            return not isinstance(shift, Node) or shift in zero
        return name == "rms_norm" and node.args[0] in zero


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


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", "")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
