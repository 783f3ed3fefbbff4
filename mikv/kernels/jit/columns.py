"""How much attention each key of a prompt receives, in Triton. See mikv/kernels/columns_reference.py for what is computed.

Scores are made transposed, a tile of keys times a tile of queries: the sum over queries then runs along a thread's own
numbers. The tile of keys stays where it is while all later queries of all heads of its group pass by.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _received(
    key,
    query_ptr,
    lse_ptr,
    first,
    first_key,
    tokens,
    unit,
    D: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attention that BK keys receive from BQ queries, fp32 [BK]. MASKED: some of these are before the keys, or none."""
    place = first + tl.arange(0, BQ)
    channel = tl.arange(0, D)
    where = query_ptr + place[None, :] * D + channel[:, None]
    if MASKED:
        query = tl.load(where, mask=(place < tokens)[None, :], other=0.0)
        lse = tl.load(lse_ptr + place, mask=place < tokens, other=float("inf"))
    else:
        query = tl.load(where)
        lse = tl.load(lse_ptr + place)
    if WIDE:
        query = query.to(tl.float32)
    logits = tl.dot(key, query)
    p = tl.exp2(logits * unit - lse[None, :])
    if MASKED:
        p = tl.where(place[None, :] >= (first_key + tl.arange(0, BK))[:, None], p, 0.0)
    return tl.sum(p, axis=1)


@triton.jit
def column_sums(
    query_ptr,
    key_ptr,
    lse_ptr,
    padding_ptr,
    sums_ptr,
    unit,
    heads,
    tokens,
    G: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (tile of keys, row * heads + head). query [B, Hq, T, D], key [B, H, T, D], lse fp32 [B, Hq, T] (base 2),
    padding int32 [B] or None -> sums fp32 [B, H, T]. unit: scaling of logits in base 2. BK divides BQ or is divided by it.
    """
    first_key = tl.program_id(0) * BK
    pair = tl.program_id(1).to(tl.int64)
    place = first_key + tl.arange(0, BK)
    channel = tl.arange(0, D)
    here = (place < tokens)[:, None]
    key = tl.load(key_ptr + (pair * tokens + place[:, None]) * D + channel[None, :], mask=here, other=0.0)
    if WIDE:
        key = key.to(tl.float32)
    # queries from `body` on come after all keys of the tile
    aligned = first_key // BQ * BQ
    body = (first_key + BK + BQ - 2) // BQ * BQ
    full = tl.maximum(tokens // BQ * BQ, body)
    ahead = tl.cdiv(body - aligned, BQ)
    edges = ahead + tl.where(full < tokens, 1, 0)
    sums = tl.zeros([BK], tl.float32)
    for g in range(G):
        head_query_ptr = query_ptr + (pair * G + g) * tokens * D
        head_lse_ptr = lse_ptr + (pair * G + g) * tokens
        for edge in tl.range(0, edges, num_stages=1):
            first = tl.where(edge < ahead, aligned + edge * BQ, full)
            sums += _received(
                key, head_query_ptr, head_lse_ptr, first, first_key, tokens, unit, D, BK, BQ, True, WIDE
            )  # fmt: skip
        for first in tl.range(body, tokens // BQ * BQ, BQ, num_stages=STAGES):
            first = tl.multiple_of(first, BQ)
            sums += _received(
                key, head_query_ptr, head_lse_ptr, first, first_key, tokens, unit, D, BK, BQ, False, WIDE
            )  # fmt: skip
    if padding_ptr is not None:
        sums = tl.where(place >= tl.load(padding_ptr + pair // heads), sums, 0.0)
    tl.store(sums_ptr + pair * tokens + place, sums, mask=place < tokens)


@triton.jit
def log_sum_exp(
    query_ptr,
    key_ptr,
    padding_ptr,
    lse_ptr,
    unit,
    query_heads,
    tokens,
    G: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (tile of queries, row * Hq + query head) -> lse fp32 [B, Hq, T], natural, over the keys a query may see;
    -inf for queries that are padding. Arguments as of column_sums."""
    first_query = tl.program_id(0) * BQ
    pair = tl.program_id(1).to(tl.int64)
    place = first_query + tl.arange(0, BQ)
    channel = tl.arange(0, D)
    query = tl.load(
        query_ptr + (pair * tokens + place[:, None]) * D + channel[None, :], mask=(place < tokens)[:, None], other=0.0
    )
    if WIDE:
        query = query.to(tl.float32)
    key_ptr += pair // G * tokens * D
    padding = 0
    if padding_ptr is not None:
        padding = tl.load(padding_ptr + pair // query_heads)
    maximum = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    for first in tl.range(padding // BK * BK, tl.minimum(first_query + BQ, tokens), BK, num_stages=STAGES):
        column = first + tl.arange(0, BK)
        key = tl.load(key_ptr + column[None, :] * D + channel[:, None], mask=(column < tokens)[None, :], other=0.0)
        if WIDE:
            key = key.to(tl.float32)
        logits = tl.dot(query, key) * unit
        seen = (column[None, :] <= place[:, None]) & (column >= padding)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(maximum, tl.max(logits, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: -inf - -inf is no number
        total = total * tl.exp2(maximum - safe) + tl.sum(tl.exp2(logits - safe[:, None]), axis=1)
        maximum = new
    some = total > 0
    lse = tl.where(some, (maximum + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + pair * tokens + place, lse, mask=place < tokens)
