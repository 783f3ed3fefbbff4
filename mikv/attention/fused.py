"""Causal attention through torch's fused kernel: what `causal_attention` computes, where no observer needs probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

# Queries at a time: the mask of a block stays small, and memory grows linearly with T.
QUERY_BLOCK = 256


def fused_causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, padding: Tensor | None = None) -> Tensor:
    """As mikv.attention.reference.causal_attention, up to rounding.

    Args:
        query: [B, Hq, Tq, D]; the last Tq of the T columns.
        key, value: [B, H, T, D].
        scaling: factor of the scores.
        padding: bool [B, T], True where a column is real; None = all are.

    Returns:
        [B, Tq, Hq, D]. Rows of padding hold finite garbage.
    """
    batch, query_heads, queries, _ = query.shape
    heads, columns = key.shape[1], key.shape[2]
    grouped = query.unflatten(1, (heads, -1))  # [B, H, G, Tq, D]
    column = torch.arange(columns, device=query.device)
    outputs = []
    for start in range(0, queries, QUERY_BLOCK):
        block = grouped[:, :, :, start : start + QUERY_BLOCK]
        first = columns - queries + start
        end = first + block.shape[3]
        allowed = (column[:end] <= column[first:end, None]).expand(1, 1, -1, -1)
        if padding is not None:
            # a query that is padding sees its own column, so that its row is not empty
            own = column[:end] == column[first:end, None]
            allowed = (allowed & padding[:, None, None, :end]) | own
        # the query heads of a group read the same keys: they are more queries of one head
        mask = allowed.unsqueeze(2).expand(-1, -1, block.shape[2], -1, -1).flatten(2, 3)
        out = torch.nn.functional.scaled_dot_product_attention(
            block.flatten(2, 3), key[:, :, :end], value[:, :, :end], attn_mask=mask, scale=scaling
        )
        outputs.append(out.unflatten(2, block.shape[2:4]))
    out = torch.cat(outputs, dim=3) if len(outputs) > 1 else outputs[0]
    return out.reshape(batch, query_heads, queries, -1).transpose(1, 2)
