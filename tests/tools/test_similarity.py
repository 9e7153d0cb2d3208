"""Structural similarity against loops over windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphwright.tools.similarity import structural_similarity


def by_hand(x: np.ndarray, y: np.ndarray, span: float) -> float:
    scores = []
    for top in range(x.shape[0] - 6):
        for left in range(x.shape[1] - 6):
            a, b = (v[top : top + 7, left : left + 7].ravel() for v in (x, y))
            c = np.cov(a, b, ddof=1)
            small, smaller = (0.01 * span) ** 2, (0.03 * span) ** 2
            above = (2 * a.mean() * b.mean() + small) * (2 * c[0, 1] + smaller)
            scores.append(above / ((a.mean() ** 2 + b.mean() ** 2 + small) * (c[0, 0] + c[1, 1] + smaller)))
    return float(np.mean(scores))


def test_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(3, 1, 9, 8, generator=generator) * 2 - 1
    other = (one + 0.4 * torch.randn(one.shape, generator=generator)).clamp(-1, 1)
    got = structural_similarity(one, other)
    want = [by_hand(one[i, 0].double().numpy(), other[i, 0].double().numpy(), 2.0) for i in range(3)]
    assert got.tolist() == pytest.approx(want)
    assert all(0.2 < w < 0.98 for w in want)
    assert structural_similarity(one, one).tolist() == pytest.approx([1, 1, 1])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="sides from 7"):
        structural_similarity(torch.ones(1, 1, 6, 6), torch.ones(1, 1, 6, 6))
