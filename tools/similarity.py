"""The structural similarity of two pictures."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d


def structural_similarity(one: Tensor, other: Tensor, span: float = 2.0, window: int = 7) -> Tensor:
    """Return the mean structural similarity (SSIM; Wang et al., 2004) of each pair of pictures.

    With uniform windows and unbiased variances, as in scikit-image.

    Args:
        one: ``[n, channels, height, width]``, floating point.
        other: Of the same shape.
        span: Largest less smallest possible value; 2 for pictures in [-1, 1].
        window: Side of the windows.

    Returns:
        ``[n]``, float64, at most 1; 1 for equal pictures.

    Raises:
        ValueError: The shapes differ, or a side is shorter than the window.
    """
    if one.shape != other.shape or one.dim() != 4 or min(one.shape[2:]) < window:
        raise ValueError(
            f"need two [n, channels, height, width] with sides from {window}, got {list(one.shape)}, {list(other.shape)}"
        )
    x, y = one.double(), other.double()
    unbiased = window**2 / (window**2 - 1)

    def mean(value: Tensor) -> Tensor:
        return avg_pool2d(value, window, stride=1)

    mx, my = mean(x), mean(y)
    vx, vy, covariance = (
        unbiased * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    small, smaller = (0.01 * span) ** 2, (0.03 * span) ** 2
    score = (2 * mx * my + small) * (2 * covariance + smaller)
    return (score / ((mx**2 + my**2 + small) * (vx + vy + smaller))).flatten(1).mean(1)
