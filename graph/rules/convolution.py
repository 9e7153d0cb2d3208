"""Convolutions, their transposes, and the windows they are made of."""

from __future__ import annotations

from torch.fx import Node

from ..axes import Axis
from ..operators import arg, base_name, groups_of, is_transposed, set_groups, weight_of
from .base import Analysis, AxesRule, Dims, Resizer, out_sizes

SPATIAL = "spatial size"
KERNEL = "kernel size"
DYNAMIC_GROUPS = "a convolution with a dynamic number of groups"


def _axes_of(an: Analysis, node: Node) -> tuple[Axis, Axis, Dims]:
    """Return the input and output channel axes that the weight and the groups imply, and the weight's dims.

    A convolution's weight is ``[g * out, in, k...]``, a transposed one's ``[g * in, out, k...]``: the group axis
    ``g`` is shared by the input channels, the output channels and the weight.
    """
    weight = an.of(weight_of(node))
    groups = groups_of(node)
    an.freeze_all(weight[2:], KERNEL)
    if groups == 1:
        pair = (weight[0], weight[1])
    else:
        group = an.leaf(groups)
        outer = an.product([group, an.leaf(weight[0].size // groups)])
        an.unify(weight[0], outer)
        pair = (outer, an.product([group, weight[1]]))
    if is_transposed(node):
        return pair[0], pair[1], weight
    return pair[1], pair[0], weight


def convolution(an: Analysis, node: Node) -> Dims:
    """``x[batch, in, s...]`` to ``[batch, out, s'...]``; unbatched inputs have no first dimension."""
    x = an.of(arg(node, 0, "input"))
    if not isinstance(groups_of(node), int):
        for n in node.all_input_nodes:
            an.freeze_all(an.of(n), DYNAMIC_GROUPS)
        return an.fresh(node.meta["val"], DYNAMIC_GROUPS)
    cin, cout, weight = _axes_of(an, node)
    bias = an.of(arg(node, 2, "bias"))
    if bias:
        an.unify(cout, bias[0])
    lead = len(x) - len(weight) + 1  # 1 with a batch dimension, else 0
    an.unify(x[lead], cin)
    if not an.is_masked(weight_of(node)):
        # Each group of output channels sums over its own inputs; what goes with a group is no term of a sum.
        inputs = 0 if is_transposed(node) else 1
        an.sum_over(weight[inputs], (arg(node, 0, "input"), lead), (weight_of(node), inputs))
    spatial = x[lead + 1 :]
    an.freeze_all(spatial, SPATIAL)
    return (*x[:lead], cout, *_spatial(an, out_sizes(node)[lead + 1 :]))


def resize_convolution(rz: Resizer, node: Node) -> None:
    """``groups`` shrinks when the group axis does."""
    groups = groups_of(node)
    if groups == 1:
        return
    weight = rz.of(weight_of(node))
    # Of the weight's first dimension, Product(group, width), the indices that stay name the groups that stay.
    kept = rz.kept(weight[0])
    if kept is None:
        return
    width = weight[0].size // groups
    left = len(set((kept // width).tolist()))
    set_groups(node, left)


def _spatial(an: Analysis, sizes: tuple) -> Dims:
    return tuple(an.leaf(size, SPATIAL) for size in sizes)


def pool(an: Analysis, node: Node) -> Dims:
    """Pooling and resampling over the trailing dimensions, as many as the operator's name says."""
    x = an.of(node.args[0])
    name = base_name(node)
    rank = next(int(c) for c in name[::-1] if c.isdigit()) if any(c.isdigit() for c in name) else len(x) - 2
    an.freeze_all(x[-rank:], SPATIAL)
    outputs = node.meta["val"]
    first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    spatial = an.fresh(first, SPATIAL)[-rank:]
    dims = (*x[:-rank], *spatial)
    return tuple(dims for _ in outputs) if isinstance(outputs, (tuple, list)) else dims  # type: ignore[return-value]


def im2col(an: Analysis, node: Node) -> Dims:
    """``[b, c, h, w] -> [b, c * kh * kw, windows]``."""
    x = an.of(node.args[0])
    kernel = node.args[1]
    assert isinstance(kernel, (list, tuple))
    an.freeze_all(x[-2:], SPATIAL)
    windows = an.leaf(out_sizes(node)[-1], SPATIAL)
    channels = an.product([x[-3], *(an.leaf(k, KERNEL) for k in kernel)])  # type: ignore[arg-type]
    return (*x[:-3], channels, windows)


def col2im(an: Analysis, node: Node) -> Dims:
    """``[b, c * kh * kw, windows] -> [b, c, h, w]``."""
    x = an.of(node.args[0])
    kernel = node.args[2]
    assert isinstance(kernel, (list, tuple))
    sizes = out_sizes(node)
    an.freeze(x[-1], SPATIAL)
    channels = an.leaf(sizes[-3])
    an.unify(x[-2], an.product([channels, *(an.leaf(k, KERNEL) for k in kernel)]))  # type: ignore[arg-type]
    return (*x[:-2], channels, *_spatial(an, sizes[-2:]))


def unfold(an: Analysis, node: Node) -> Dims:
    """``Tensor.unfold``: a dimension becomes windows, and the window's content a new last dimension."""
    x = an.of(node.args[0])
    dim = arg(node, 1, "dimension") % len(x)
    an.freeze(x[dim], SPATIAL)
    sizes = out_sizes(node)
    return (*x[:dim], an.leaf(sizes[dim], SPATIAL), *x[dim + 1 :], an.leaf(sizes[-1], KERNEL))


def pixel_shuffle(an: Analysis, node: Node) -> Dims:
    """``[..., c * r * r, h, w] -> [..., c, h * r, w * r]``."""
    x = an.of(node.args[0])
    factor = arg(node, 1, "upscale_factor")
    sizes = out_sizes(node)
    channels = an.leaf(sizes[-3])
    r = an.leaf(factor, KERNEL), an.leaf(factor, KERNEL)
    an.unify(x[-3], an.product([channels, *r]))
    an.freeze_all(x[-2:], SPATIAL)
    return (*x[:-3], channels, *_spatial(an, sizes[-2:]))


def pixel_unshuffle(an: Analysis, node: Node) -> Dims:
    """``[..., c, h * r, w * r] -> [..., c * r * r, h, w]``."""
    x = an.of(node.args[0])
    factor = arg(node, 1, "downscale_factor")
    an.freeze_all(x[-2:], SPATIAL)
    channels = an.product([x[-3], an.leaf(factor, KERNEL), an.leaf(factor, KERNEL)])
    return (*x[:-3], channels, *_spatial(an, out_sizes(node)[-2:]))


def channel_shuffle(an: Analysis, node: Node) -> Dims:
    """``Product(g, c) -> Product(c, g)`` on dimension 1."""
    x = an.of(node.args[0])
    groups = arg(node, 1, "groups")
    g, c = an.leaf(groups, "channel shuffle groups"), an.leaf(x[1].size // groups)
    an.unify(x[1], an.product([g, c]))
    return (x[0], an.product([c, g]), *x[2:])


def grid_sample(an: Analysis, node: Node) -> Dims:
    """Sampling at computed places: channels pass, everything else is spatial."""
    x, grid = an.of(node.args[0]), an.of(node.args[1])
    an.freeze_all((*x[2:], *grid[1:]), SPATIAL)
    an.unify(x[0], grid[0])
    return (*x[:2], *_spatial(an, out_sizes(node)[2:]))


_POOLS = (
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d upsample_linear1d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d "
    "reflection_pad3d"
)

_CONVS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution convolution_overrideable"

RULES: dict[str, AxesRule] = {
    **{name: AxesRule(convolution, resize_convolution) for name in _CONVS.split()},
    **{name: AxesRule(pool) for name in _POOLS.split()},
    "im2col": AxesRule(im2col),
    "col2im": AxesRule(col2im),
    "unfold": AxesRule(unfold),
    "pixel_shuffle": AxesRule(pixel_shuffle),
    "pixel_unshuffle": AxesRule(pixel_unshuffle),
    "channel_shuffle": AxesRule(channel_shuffle),
    "native_channel_shuffle": AxesRule(channel_shuffle),
    "grid_sampler": AxesRule(grid_sample),
    "grid_sampler_2d": AxesRule(grid_sample),
}
