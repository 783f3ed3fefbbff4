"""Attention in torch, slow and obvious: what every kernel must agree with.

Two functions: causal attention of a prompt, in blocks of queries (so that memory grows linearly with T), and one decode
step over a cache in which some columns are absent. Both do what transformers' eager attention does: scores in the
model's dtype, softmax in float32, probabilities back to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

QUERY_BLOCK = 128

Watch = Callable[[Tensor, int], None]
"""Called with the probabilities of a block of queries, float32 [B, H, G, q, T'] over columns 0..T'-1, and the column of
the first of these queries."""


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, padding: Tensor | None = None, watch: Watch | None = None
) -> Tensor:
    """Exact causal attention of a left-padded batch.

    Args:
        query: [B, Hq, Tq, D]; the last Tq of the T columns.
        key, value: [B, H, T, D].
        scaling: factor of the scores, usually D ** -0.5.
        padding: bool [B, T], True where a column is real; None = all are.
        watch: is shown the probabilities, block by block.

    Returns:
        [B, Tq, Hq, D]. Rows of padding hold finite garbage.
    """
    batch, query_heads, queries, _ = query.shape
    heads, columns = key.shape[1], key.shape[2]
    grouped = query.unflatten(1, (heads, -1))  # [B, H, G, Tq, D]
    column = torch.arange(columns, device=query.device)
    blocked = torch.finfo(query.dtype).min  # finite: a row of nothing but padding stays free of NaN
    outputs = []
    for start in range(0, queries, QUERY_BLOCK):
        block = grouped[:, :, :, start : start + QUERY_BLOCK]
        first = columns - queries + start
        end = first + block.shape[3]
        scores = torch.matmul(block.flatten(2, 3), key[:, :, :end].transpose(2, 3)).mul_(scaling)
        scores = scores.unflatten(2, (-1, block.shape[3]))  # [B, H, G, q, T']
        # only the columns of the block itself can lie in the future of one of its queries
        scores[..., first:].masked_fill_(column[first:end] > column[first:end, None], blocked)
        if padding is not None:
            scores.masked_fill_(~padding[:, None, None, None, :end], blocked)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
        if watch is not None:
            watch(probs, first)
        outputs.append(torch.matmul(probs.to(value.dtype).flatten(2, 3), value[:, :, :end]).unflatten(2, block.shape[2:4]))
    out = torch.cat(outputs, dim=3) if len(outputs) > 1 else outputs[0]
    return out.reshape(batch, query_heads, queries, -1).transpose(1, 2)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, present: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """One query per row over a cache with absent columns (padding, evicted tokens).

    Args:
        query: [R, Hq, 1, D].
        key, value: [R, H, S, D].
        present: bool [R, H or 1, S]; at least one column of each row and head.
        scaling: factor of the scores.

    Returns:
        The output [R, 1, Hq, D], and the attention mass each column received, summed over the query heads of its group:
        float32 [R, H, S], exactly 0 where absent.
    """
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # [R, H, G, D]
    scores = torch.matmul(grouped, key.transpose(2, 3)).mul_(scaling)
    scores.masked_fill_(~present[:, :, None, :], -torch.inf)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
    out = torch.matmul(probs.to(value.dtype), value)
    return out.flatten(1, 2).unsqueeze(1), probs.sum(dim=2)
