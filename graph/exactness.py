"""Is a removal equal to masking? Only where whatever is summed over the axis is zero when the axis is masked.

Masking sets the removed entries of every parameter to zero. A contraction with a weight is then exact by itself. A
sum over activations (query times key, a vector norm) is exact only if one operand is zero at the masked indices;
this module answers that by walking back from the sum, as far as the answer needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.fx import Node

from .axes import Axis, leaves
from .program import get_tensor
from .rules import Analysis
from .rules.base import arg, is_tensor
from .rules.elementwise import ZERO_PRESERVING

# Past this many operators the answer is "not known to be zero", which labels more than it must and is never wrong.
MAX_DEPTH = 200

_ALL = frozenset("add sub rsub".split())
_ANY = frozenset("mul multiply matmul mm bmm mv einsum outer ger __and__ logical_and bitwise_and".split())
_AFFINE = frozenset(
    "linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
_NORMS = {
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
    "rms_norm": (2, None),
}
_STRUCTURE = frozenset(
    "view reshape _unsafe_view flatten unflatten transpose t mT permute movedim unsqueeze squeeze cat slice narrow select unbind "
    "split chunk split_with_sizes tensor_split repeat repeat_interleave expand expand_as pad constant_pad_nd stack roll flip "
    "sum mean cumsum index index_select gather pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im zeros new_zeros "
    "zeros_like avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d copy where linalg_vector_norm norm amax var std".split()
)


class Zeros:
    """Answers whether a node's value is zero at the masked indices of a leaf."""

    def __init__(self, analysis: Analysis, gm: object) -> None:
        self._analysis = analysis
        self._gm = gm
        self._memo: dict[tuple[Node, Axis], bool] = {}

    def any_zero(self, operands: Sequence[object], leaf: Axis) -> bool:
        """Whether one of ``operands`` is zero at the masked indices of ``leaf``."""
        return any(isinstance(o, Node) and self.zero(o, leaf) for o in operands)

    def zero(self, node: Node, leaf: Axis, depth: int = 0) -> bool:
        """Whether ``node`` is zero at the masked indices of ``leaf``; False where that is not known."""
        key = (node, leaf)
        if key not in self._memo:
            self._memo[key] = False
            self._memo[key] = depth < MAX_DEPTH and self._compute(node, leaf, depth + 1)
        return self._memo[key]

    def _holds(self, node: Node, leaf: Axis) -> bool:
        value = self._analysis.dims.get(node)
        if value is None:
            return False
        dims = value if not value or isinstance(value[0], Axis) else [a for v in value if v for a in v]
        return any(found is leaf for axis in dims for found in leaves(axis))

    def _compute(self, node: Node, leaf: Axis, depth: int) -> bool:
        if node.op == "get_attr":
            return isinstance(get_tensor(self._gm, str(node.target)), nn.Parameter)  # type: ignore[arg-type]
        if node.op != "call_function":
            return False
        name = _name(node)
        holders = [n for n in node.all_input_nodes if self._holds(n, leaf)]
        if not holders:
            return False
        if name in _ALL:
            scalars = any(isinstance(a, (int, float)) and a != 0 for a in node.args[:2])
            tensors = [n for n in node.all_input_nodes if is_tensor(n.meta.get("val"))]
            return not scalars and len(holders) == len(tensors) and all(self.zero(n, leaf, depth) for n in holders)
        if name in _ANY:
            return any(self.zero(n, leaf, depth) for n in holders)
        if name in ("div", "true_divide", "divide"):
            return node.args[0] in holders and self.zero(node.args[0], leaf, depth)  # type: ignore[arg-type]
        if name == "pow":  # x ** 2, not 2 ** x, and not x ** y, which is 1 where both are 0
            base, exponent = node.args
            return (
                isinstance(base, Node)
                and isinstance(exponent, (int, float))
                and exponent > 0
                and self.zero(base, leaf, depth)
            )
        if name in _AFFINE:
            bias = arg(node, 2, "bias")
            through_weight = node.args[1] in holders
            return through_weight and (bias is None or bias in holders or not isinstance(bias, Node))
        if name in _NORMS:
            weight, bias = _NORMS[name]
            scale = arg(node, weight, "weight")
            shift = None if bias is None else arg(node, bias, "bias")
            if isinstance(scale, Node):
                return self.zero(scale, leaf, depth) and (not isinstance(shift, Node) or self.zero(shift, leaf, depth))
            return name == "rms_norm" and self.zero(node.args[0], leaf, depth)  # type: ignore[arg-type]
        if name == "scaled_dot_product_attention":
            return node.args[2] in holders and self.zero(node.args[2], leaf, depth)  # type: ignore[arg-type]
        if name == "embedding":
            return node.args[0] in holders
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return all(self.zero(n, leaf, depth) or _is_zeros(n) for n in holders)
        if name in ZERO_PRESERVING or name in _STRUCTURE or name == "getitem":
            return all(self.zero(n, leaf, depth) or _is_zeros(n) for n in holders)
        return False


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", "")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _is_zeros(node: Node) -> bool:
    return _name(node) in ("zeros", "new_zeros", "zeros_like")
