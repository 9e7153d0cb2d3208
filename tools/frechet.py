"""The Frechet distance between two sets of features."""

from __future__ import annotations

from typing import Any

import torch


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features (as in FID).

    ``|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))`` for the covariances A and B, in float64. The trace
    of the root comes from the eigenvalues of the symmetric ``A^(1/2) B A^(1/2)``, which stay real
    where a root of the product turns complex for nearly singular covariances.

    Args:
        features_a: Tensor or array ``[n, d]`` with n at least 2; a small n biases the distance upwards.
        features_b: Tensor or array ``[m, d]`` with m at least 2.

    Returns:
        The distance, in squared feature units; 0 for equal Gaussians.

    Raises:
        ValueError: The shapes do not fit, or a feature is not finite.
    """
    a, b = (torch.as_tensor(f).detach().to("cpu", torch.float64) for f in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need features [n >= 2, d] and [m >= 2, d], got {list(a.shape)}, {list(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite")
    cov_a, cov_b = (torch.cov(f.T).reshape(f.shape[1], f.shape[1]) for f in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0.0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * cross
    return max(float(distance), 0.0)  # rounding can leave -1e-15
