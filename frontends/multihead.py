"""``nn.MultiheadAttention`` whose heads need not add up to the width of its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.errors import WriteBackError


class ResizedMultiheadAttention(nn.MultiheadAttention):
    """A drop-in for a ``nn.MultiheadAttention`` that lost heads or head dimensions.

    torch's own forward takes the width of the projections from the input, so it cannot hold fewer heads than
    ``embed_dim / head_dim``, and it derives the scale of the scores from the head width it has left. This one reads
    both from attributes; parameters and their names are torch's.

    Attributes:
        num_heads: Heads that are left.
        head_dim: Width of queries and keys per head. The width of values follows from the output projection.
        scale: Factor of the scores, that of the original head width.
    """

    scale: float

    @classmethod
    def adopt(cls, module: nn.MultiheadAttention, scale: float) -> None:
        """Make ``module`` one of these, with the scale of its original head width.

        Raises:
            WriteBackError: It adds keys of its own (``add_bias_kv``, ``add_zero_attn``), which this class does not.
        """
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            raise WriteBackError(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be resized; "
                "leave its groups out of the removal"
            )
        module.__class__ = cls
        module.scale = scale  # type: ignore[assignment]
        # Keeps torch's fused encoder layer, which reads the packed weight on its own terms, from being taken.
        module._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments and results of ``nn.MultiheadAttention.forward``."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        mask = self._mask(query, key, key_padding_mask, attn_mask)
        q, k, v = (self._heads(t) for t in self._project(query, key, value))  # [batch, heads, length, width]
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, drop) if drop else weights
            out = weights @ v
        else:
            causal = is_causal and mask is None
            out = F.scaled_dot_product_attention(q, k, v, mask, drop, causal, scale=self.scale)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = self.num_heads * self.head_dim
        if self.in_proj_weight is not None:
            sizes = [inner, inner, self.in_proj_weight.shape[0] - 2 * inner]
            weights: Any = self.in_proj_weight.split(sizes)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            sizes = [inner, inner, weights[2].shape[0]]
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        projected = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(x, w, b) for x, w, b in projected)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, query: Tensor, key: Tensor, padding: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """Merge both masks into one that is added to the scores ``[batch, heads or 1, queries, keys]``."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, query.dtype)
            if mask.dim() == 3:
                mask = mask.view(query.shape[0], -1, query.shape[1], key.shape[1])
                if mask.shape[1] not in (1, self.num_heads):
                    raise ValueError(
                        f"attn_mask is for {mask.shape[1]} heads, {self.num_heads} are left; pass one of 2 dimensions"
                    )
        if padding is not None:
            extra = _additive(padding, query.dtype)[:, None, None, :]
            mask = extra if mask is None else mask + extra
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
