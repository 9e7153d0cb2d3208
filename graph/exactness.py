"""Is a removal equal to masking? Only where whatever is summed over the axis is zero when the axis is masked.

Masking sets the removed entries of every parameter to zero. A contraction with a weight is then exact by itself. A
sum over activations (query times key, a vector norm) is exact only if one operand is zero at the masked indices;
this module answers that by walking back from the sum, as far as the answer needs.

The question is about one dimension of one value, a `Place`: the axis may lie in several dimensions of a value
(``h[:, :, None] + h[:, None, :]``), of which one can be zero at the masked indices and another not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.fx import Node

from .axes import Axis, leaves
from .operators import LAYERS, RECURRENT, arg, base_name, bias_of, weight_of
from .program import get_tensor
from .rules import Analysis
from .rules.base import Dims, Place
from .rules.elementwise import ZERO_PRESERVING
from .rules.linear import einsum_terms

# Past this many operators the answer is "not known to be zero", which labels more than it must and is never wrong.
MAX_DEPTH = 200

# What a place being zero comes down to: it is zero if all places of one of these are.
_Alternatives = Iterable[Sequence[Place]]
_Test = Callable[["Zeros", Place, Axis], _Alternatives]

_NO: _Alternatives = ()
_YES: _Alternatives = ((),)

_NORMS = {
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
    "rms_norm": (2, None),
}
# Each entry of the result is made of entries of the first argument (a tensor or a list) that lie at the same indices.
_MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten transpose t mT permute movedim unsqueeze squeeze slice narrow select unbind "
    "split chunk split_with_sizes tensor_split roll flip sum mean cumsum pixel_shuffle pixel_unshuffle channel_shuffle "
    "linalg_vector_norm norm amax var std view_as_complex view_as_real".split()
)
# The same, with dimensions of their own, whose indices could be those of the axis too.
_SPREADS = frozenset(
    "repeat repeat_interleave stack index index_select gather im2col col2im avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
    "upsample_linear1d".split()
)


class Zeros:
    """Answers whether a node's value is zero at the masked indices of a leaf."""

    def __init__(self, analysis: Analysis, gm: object) -> None:
        self._analysis = analysis
        self._gm = gm
        self._memo: dict[tuple[Place, Axis], bool] = {}
        self._overwritten = _overwritten(analysis.dims)

    def any_zero(self, places: Iterable[Place], leaf: Axis) -> bool:
        """Whether one of ``places`` is zero at the masked indices of ``leaf``."""
        return any(self.zero(place, leaf) for place in places)

    def zero(self, place: Place, leaf: Axis, depth: int = 0) -> bool:
        """Whether ``place`` is zero at the masked indices of ``leaf``; False where it has none or that is not known."""
        key = (place, leaf)
        if key not in self._memo:
            self._memo[key] = False
            self._memo[key] = (
                depth < MAX_DEPTH
                and place.node not in self._overwritten
                and self.holds(place, leaf)
                and self._some_zero(self._alternatives(place, leaf), leaf, depth + 1)
            )
        return self._memo[key]

    def dims(self, node: object, output: int | None = None) -> Dims:
        """Return the dims of a node's value, or of tensor number ``output`` of it; none of what is no tensor."""
        value = self._analysis.dims.get(node) if isinstance(node, Node) else None
        if value and output is not None:
            value = value[output]
        return value if value and isinstance(value[0], Axis) else ()

    def holds(self, place: Place, leaf: Axis) -> bool:
        """Whether the dimension carries ``leaf``."""
        dims = self.dims(place.node, place.output)
        return 0 <= place.dim < len(dims) and any(found is leaf for found in leaves(dims[place.dim]))

    def carriers(self, node: object, leaf: Axis) -> list[Place]:
        """Return every dimension of every tensor of ``node`` that carries ``leaf``."""
        if not isinstance(node, Node):
            return []
        value = self._analysis.dims.get(node) or ()
        outputs = [None] if not value or isinstance(value[0], Axis) else range(len(value))
        places = [Place(node, d, o) for o in outputs for d in range(len(self.dims(node, o)))]
        return [place for place in places if self.holds(place, leaf)]

    def times(self, dims: Dims, leaf: Axis) -> int:
        """Return how often ``leaf`` occurs in ``dims``."""
        return sum(found is leaf for axis in dims for found in leaves(axis))

    def _some_zero(self, alternatives: _Alternatives, leaf: Axis, depth: int) -> bool:
        for places in alternatives:
            for place in places:
                if not self.zero(place, leaf, depth):
                    break
            else:
                return True
        return False

    def _alternatives(self, place: Place, leaf: Axis) -> _Alternatives:
        node = place.node
        if node.op == "get_attr":
            tensor = get_tensor(self._gm, str(node.target))  # type: ignore[arg-type] (FX arguments have any type)
            return _YES if isinstance(tensor, nn.Parameter) else _NO
        if node.op != "call_function":
            return _NO
        test = _TESTS.get(base_name(node))
        return _NO if test is None else test(self, place, leaf)


def _aligned(zeros: Zeros, place: Place, operand: object) -> list[Place]:
    """Return the dimension of an operand that broadcasts to ``place``, right-aligned; none of a number."""
    if not isinstance(operand, Node):
        return []
    shift = len(zeros.dims(place.node, place.output)) - len(zeros.dims(operand))
    return [Place(operand, place.dim - shift)]


def _given(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    return _YES


def _getitem(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    source, output = place.node.args[:2]
    return [[Place(source, place.dim, output)]]  # type: ignore[arg-type] (FX arguments have any type)


def _move(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    sources = _listed(place.node.args[0])
    carriers = [zeros.carriers(source, leaf) for source in sources]
    return [sum(carriers, [])] if all(carriers) else _NO


def _spread(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    sources = _listed(place.node.args[0])
    before = max((zeros.times(zeros.dims(source), leaf) for source in sources), default=0)
    after = zeros.times(zeros.dims(place.node, place.output), leaf)
    return _move(zeros, place, leaf) if after <= before else _NO


def _concatenation(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    holders = [
        p for source in _listed(place.node.args[0]) for p in _aligned(zeros, place, source) if zeros.holds(p, leaf)
    ]
    return [holders] if holders else _NO


def _first(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    source = place.node.args[0]
    return [_aligned(zeros, place, source)] if isinstance(source, Node) else _NO


def _second(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    source = place.node.args[1]
    return [_aligned(zeros, place, source)] if isinstance(source, Node) else _NO


def _sum(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    operands = place.node.args[:2]
    if any(_is_nonzero(o) for o in operands):
        return _NO
    return [[p for o in operands for p in _aligned(zeros, place, o)]]


def _product(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    return [_aligned(zeros, place, o) for o in place.node.args[:2] if isinstance(o, Node)]


def _where(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    branches = place.node.args[1:3]
    if any(_is_nonzero(b) for b in branches):
        return _NO
    return [[p for b in branches for p in _aligned(zeros, place, b)]]


def _pad(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    return _NO if any(_is_nonzero(a) for a in place.node.args[2:]) else _first(zeros, place, leaf)


def _power(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    """``x ** 2``, not ``2 ** x``, and not ``x ** y``, which is 1 where both are 0."""
    exponent = place.node.args[1]
    return _first(zeros, place, leaf) if isinstance(exponent, (int, float)) and exponent > 0 else _NO


def _matmul(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    return _matrix_product(zeros, place, *place.node.args[:2])


def _matrix_product(zeros: Zeros, place: Place, a: object, b: object) -> _Alternatives:
    """Rows come from ``a[..., n, k]``, columns from ``b[..., k, m]``, batch dimensions from either; k is gone."""
    assert isinstance(a, Node) and isinstance(b, Node)
    rows, columns = len(zeros.dims(a)) > 1, len(zeros.dims(b)) > 1
    batch = len(zeros.dims(place.node)) - rows - columns
    if place.dim >= batch + rows:
        return [[Place(b, len(zeros.dims(b)) - 1)]]
    if place.dim >= batch:
        return [[Place(a, len(zeros.dims(a)) - 2)]]
    found = (Place(n, place.dim - batch + len(zeros.dims(n)) - 2) for n in (a, b))
    return [[p] for p in found]


def _addmm(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    bias, a, b = place.node.args[:3]
    extra = _aligned(zeros, place, bias)
    return [[*places, *extra] for places in _matrix_product(zeros, place, a, b)]


def _einsum(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    equation, operands = place.node.args[:2]
    ranks = [len(zeros.dims(o)) for o in operands]  # type: ignore[union-attr] (FX arguments have any type)
    terms, output = einsum_terms(equation, ranks)  # type: ignore[arg-type] (FX arguments have any type)
    letter = output[place.dim]
    return [
        [Place(o, d)]  # type: ignore[arg-type] (FX arguments have any type)
        for term, o in zip(terms, operands, strict=True)  # type: ignore[arg-type] (FX arguments have any type)
        for d, other in enumerate(term)
        if other == letter
    ]


def _outer(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    return [[Place(place.node.args[place.dim], 0)]]  # type: ignore[arg-type] (FX arguments have any type)


def _layer(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    """Output features come from the weight's; the weight of a transposed convolution has its groups elsewhere."""
    node, weight, bias = place.node, weight_of(place.node), bias_of(place.node)
    spatial = 0 if base_name(node) == "linear" else len(zeros.dims(weight)) - 2
    if place.dim != len(zeros.dims(node)) - 1 - spatial:
        return _NO
    carriers = zeros.carriers(weight, leaf)
    shift = [Place(bias, 0)] if isinstance(bias, Node) else []
    return [[*carriers, *shift]] if carriers else _NO


def _norm(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    node, name = place.node, base_name(place.node)
    weight, bias = _NORMS[name]
    last = name in ("layer_norm", "rms_norm")
    scale, shift = arg(node, weight, "weight"), None if bias is None else arg(node, bias, "bias")
    found = [] if name != "rms_norm" else [_aligned(zeros, place, node.args[0])]
    if isinstance(scale, Node) and (last or place.dim == 1):
        affine = [n for n in (scale, shift) if isinstance(n, Node)]
        found.append([p for n in affine for p in (_aligned(zeros, place, n) if last else [Place(n, 0)])])
    return found


def _embedding(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    weight = place.node.args[0]
    return [[Place(weight, 1)]] if place.dim == len(zeros.dims(place.node, place.output)) - 1 else _NO  # type: ignore[arg-type]


def _attention(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    """Features and heads of the values; positions are those of the queries."""
    if place.dim == len(zeros.dims(place.node)) - 2:
        return _NO
    return [_aligned(zeros, place, place.node.args[2])]


def _recurrent(zeros: Zeros, place: Place, leaf: Axis) -> _Alternatives:
    """Hidden features are zero where all weights, biases and first states are."""
    if place.dim != len(zeros.dims(place.node, place.output)) - 1:
        return _NO
    return [[p for n in place.node.all_input_nodes for p in zeros.carriers(n, leaf)]]


_TESTS: dict[str, _Test] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_SPREADS, _spread),
    **dict.fromkeys(ZERO_PRESERVING - _MOVES, _first),
    **dict.fromkeys(("expand", "expand_as"), _first),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _given),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenation),
    **dict.fromkeys(RECURRENT, _recurrent),
    "getitem": _getitem,
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys("mul multiply __and__ logical_and bitwise_and".split(), _product),
    **dict.fromkeys("matmul mm bmm mv".split(), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    "einsum": _einsum,
    **dict.fromkeys(("outer", "ger"), _outer),
    **dict.fromkeys(("div", "true_divide", "divide"), _first),
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), _embedding),
    "where": _where,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "copy": _second,
    "pow": _power,
    **dict.fromkeys((name for name, layer in LAYERS.items() if layer.bias == (2, "bias")), _layer),
    **dict.fromkeys(_NORMS, _norm),
    "scaled_dot_product_attention": _attention,
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
        base[node] = base.get(first, first) if alias else node  # type: ignore[arg-type, assignment] (FX arguments have any type)
        family.setdefault(base[node], []).append(node)
        if alias and info is not None and info.is_write:
            writes.append((node, base[node]))
    return {
        node
        for write, root in writes
        for node in family[root]
        if node is not write and any(order.get(user, -1) > order[write] for user in node.users)
    }


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_nonzero(value: object) -> bool:
    return isinstance(value, (int, float)) and value != 0
