"""Decode attention over packed tiers in torch, slow and obvious: everything is unpacked, then attended. The Triton kernels
have the same signature and must agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mikv.kernels.segments import Attention, Segment, Vectors, check_segments
from mikv.quant.affine import Quantized, dequantize
from mikv.quant.codes import trellis
from mikv.quant.packing import unpack


def decode_attention(query: Tensor, segments: Sequence[Segment], scaling: float) -> Attention:
    """One query per row over all segments of a cache, in float32.

    Args:
        query: [R, Hq, D], any float dtype.
        segments: the tiers' packed pairs.
        scaling: factor of the logits, usually D ** -0.5.

    Raises:
        ValueError: shapes, dtypes or strides that don't fit.
    """
    check_segments(query, segments)
    dim = query.shape[2]
    logits, values = [], []
    for segment in segments:
        heads = segment.keys.data.shape[1]
        grouped = (query if segment.query is None else segment.query).float().unflatten(1, (heads, -1))  # [R, H, G, D]
        if segment.balancer is not None:
            grouped = grouped / segment.balancer[:, :, None]
        absent = ~held(segment)
        values.append(read(segment.values, dim).masked_fill(absent[..., None], 0))  # 0 * NaN is no 0
        scores = torch.matmul(grouped, read(segment.keys, dim).transpose(2, 3))
        scores = (scores if segment.shift is None else scores + segment.shift) * scaling
        logits.append(scores.masked_fill(absent[:, :, None], -torch.inf))
    probs = torch.softmax(torch.cat(logits, dim=-1), dim=-1).nan_to_num(0.0)  # NaN: a row that sees nothing
    parts = probs.split([segment.slots for segment in segments], dim=-1)
    out = torch.zeros((*probs.shape[:3], dim), device=query.device)
    for segment, part, value in zip(segments, parts, values, strict=True):
        mine = torch.matmul(part, value)
        out += mine if segment.output is None else segment.output(mine, part.sum(dim=-1, keepdim=True))
    mass = [part.sum(dim=2) if segment.wants_mass else None for part, segment in zip(parts, segments, strict=True)]
    return Attention(out.flatten(1, 2).to(query.dtype), mass)


def held(segment: Segment) -> Tensor:
    """bool [R, H, S]: slots that hold a pair."""
    return torch.arange(segment.slots, device=segment.stop.device) < segment.stop[..., None]


def read(vectors: Vectors, dim: int) -> Tensor:
    """float32 [R, H, S, D] of stored vectors (a balancer is not undone)."""
    if vectors.scale is None:
        return vectors.data.float()
    if vectors.levels is not None:
        codes = unpack(vectors.data, vectors.bits, dim)
        table = vectors.levels.float()
        known = trellis.read(codes, table) if vectors.kind == "trellis" else table[codes.int()]
        return known.mul_(vectors.scale.float())
    assert vectors.zero is not None
    return dequantize(Quantized(unpack(vectors.data, vectors.bits, dim, torch.float32), vectors.scale, vectors.zero))
