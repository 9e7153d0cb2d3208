"""Grouped matrix products of mixtures of experts, through ONNX Runtime, against one product for each row."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphwright.backends.onnx_export import export_onnx
from graphwright.frontends.capture import capture

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers.integrations.moe")

# The group of each row; rows of group 4 belong to none.
GROUPS = [[0, 0, 2, 2, 2, 3], [3] * 6, [0] * 6, [0, 1, 2, 3, 4, 4], [4] * 6, [0, 0, 0, 1, 1, 2, 2, 2, 3]]


class Experts(nn.Module):
    """Every row times the matrix of its group; the rows come sorted by group."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 5))
        self.dtype = dtype

    def forward(self, rows: Tensor, group: Tensor) -> Tensor:
        group, order = torch.sort(group)
        ends = (group[:, None] == torch.arange(4)).sum(0).cumsum(0).to(self.dtype)
        return torch.ops.transformers.grouped_mm_fallback(rows[order], self.weight, ends)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_grouped_product_for_any_groups_and_number_of_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Experts(dtype).eval()
    program = capture(model, (torch.randn(6, 3), torch.tensor(GROUPS[3])))
    runner = export_onnx(program, tmp_path).runner()
    weight = torch.cat([model.weight.detach(), torch.zeros(1, 3, 5)])
    for group in GROUPS:
        rows = torch.randn(len(group), 3)
        (got,) = runner(rows, torch.tensor(group))
        want = torch.stack([row @ weight[g] for row, g in zip(rows, group, strict=True)])
        # Three products in float32, in another order.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert bool((want != 0).any()) == (min(group) < 4)
