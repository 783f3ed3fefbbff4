"""How much attention each key of a prompt receives in all: column sums of causal softmax attention, in torch, in blocks of
queries. Given every query's log-sum-exp no row needs to be seen whole, and no T x T matrix is ever made: memory grows
linearly with T. Fused attention returns the log-sum-exp along with its output; `log_sum_exp` computes it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 128


class Block(NamedTuple):
    """Logits of some queries, float32 [B, H, G, q, T'] over columns 0..T'-1, -inf where a query may not see a key; and the
    columns of the queries."""

    logits: Tensor
    queries: slice


def column_sums(query: Tensor, key: Tensor, lse: Tensor, scaling: float, padding: Tensor | None = None) -> Tensor:
    """Attention that each key receives, summed over all real queries and the query heads of its group, in float32.

    Args:
        query: [B, Hq, T, D] of the whole prompt.
        key: [B, H, T, D].
        lse: float32 [B, Hq, T], natural logarithm of each query's softmax denominator (`log_sum_exp`).
        scaling: factor of the logits, usually D ** -0.5.
        padding: int32 [B], columns at the left that hold no token; None = 0.

    Returns:
        float32 [B, H, T], 0 where there is no token.

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    check_columns(query, key, padding, lse)
    grouped = lse.unflatten(1, (key.shape[1], -1))
    sums = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    for block in _blocks(query, key, scaling, padding):
        # a query of padding sees nothing, and its log-sum-exp is -inf: no difference of the two may be taken
        rest = grouped[:, :, :, block.queries, None].masked_fill(block.logits == -torch.inf, 0)
        sums[:, :, : block.logits.shape[-1]] += (block.logits - rest).exp().sum(dim=(2, 3))
    return sums


def log_sum_exp(query: Tensor, key: Tensor, scaling: float, padding: Tensor | None = None) -> Tensor:
    """float32 [B, Hq, T], natural: over the keys each query may see; -inf for padding. Arguments as of `column_sums`."""
    check_columns(query, key, padding)
    parts = [block.logits.logsumexp(dim=-1) for block in _blocks(query, key, scaling, padding)]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def _blocks(query: Tensor, key: Tensor, scaling: float, padding: Tensor | None) -> Iterator[Block]:
    grouped = query.unflatten(1, (key.shape[1], -1))
    column = torch.arange(key.shape[2], device=key.device)
    for first in range(0, key.shape[2], QUERY_BLOCK):
        queries = column[first : first + QUERY_BLOCK]
        end = first + len(queries)
        block = grouped[:, :, :, first:end].flatten(2, 3).float()
        logits = torch.matmul(block, key[:, :, :end].float().transpose(2, 3)).mul_(scaling)
        hidden = (column[:end] > queries[:, None])[None]
        if padding is not None:
            hidden = hidden | (column[:end] < padding[:, None])[:, None]
        logits = logits.unflatten(2, (-1, len(queries))).masked_fill_(hidden[:, None, None], -torch.inf)
        yield Block(logits, slice(first, end))


def check_columns(query: Tensor, key: Tensor, padding: Tensor | None, lse: Tensor | None = None) -> None:
    """Refuse what a kernel would misread."""
    batch, query_heads, tokens, dim = query.shape
    if key.shape != (batch, key.shape[1], tokens, dim) or query_heads % key.shape[1]:
        raise ValueError(f"keys {list(key.shape)} don't belong to queries {list(query.shape)}")
    if key.dtype != query.dtype:
        raise ValueError(f"keys are {key.dtype}, queries {query.dtype}")
    if padding is not None and (padding.dtype != torch.int32 or padding.shape != (batch,)):
        raise ValueError(f"padding must be int32 [{batch}], not {padding.dtype} {list(padding.shape)}")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != query.shape[:3]):
        raise ValueError(f"lse must be float32 {list(query.shape[:3])}, not {lse.dtype} {list(lse.shape)}")
