"""Decode attention over packed tiers for a CPU: the torch reference's results, several times as fast.

On a CPU the cost is passes over memory, not arithmetic. Codes are taken out of whole bytes, one shift, one mask and one
conversion for each field, and used as they come: no pass puts them into the channels' order, multiplies them by scales or
adds minima. The query is put into the codes' order instead, and scales and minima stay out of the products (q . (s c + m) =
s (q . c) + m sum(q)).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mikv.kernels.decode_reference import held, read
from mikv.kernels.segments import Attention, Segment, Vectors, check_segments


def decode_attention(query: Tensor, segments: Sequence[Segment], scaling: float) -> Attention:
    """As mikv.kernels.decode_reference.decode_attention, in another order of summation."""
    check_segments(query, segments)
    dim = query.shape[2]
    logits = []
    for segment in segments:
        mine = query if segment.query is None else segment.query
        grouped = mine.float().unflatten(1, (segment.keys.data.shape[1], -1)) * scaling  # [R, H, G, D]
        if segment.balancer is not None:
            grouped = grouped / segment.balancer[:, :, None]
        scores = _scores(grouped, segment.keys)
        if segment.shift is not None:
            scores = scores + segment.shift * scaling
        logits.append(scores.masked_fill_(~held(segment)[:, :, None], -torch.inf))
    probs = torch.softmax(torch.cat(logits, dim=-1), dim=-1).nan_to_num_(0.0)  # NaN: a row that sees nothing
    parts = probs.split([segment.slots for segment in segments], dim=-1)
    out = torch.zeros((*probs.shape[:3], dim))
    for segment, part in zip(segments, parts, strict=True):
        mine = _weighted(part, segment.values, held(segment), dim)
        out += mine if segment.output is None else segment.output(mine, part.sum(dim=-1, keepdim=True))
    mass = [part.sum(dim=2) if segment.wants_mass else None for segment, part in zip(segments, parts, strict=True)]
    return Attention(out.flatten(1, 2).to(query.dtype), mass)


def _scores(query: Tensor, keys: Vectors) -> Tensor:
    """query . key, float32 [R, H, G, S], of query [R, H, G, D]; anything where nothing is held."""
    if keys.scale is None or keys.zero is None:
        return torch.matmul(query, read(keys, query.shape[3]).transpose(2, 3))
    groups = keys.groups
    split = _per_group(query, groups)  # [R, H, groups, G, D], zero outside the group
    products = torch.zeros((*query.shape[:2], groups * query.shape[2], keys.data.shape[2]))
    for field in _fields(keys, query.shape[3]):
        products += torch.matmul(split[..., field.channels].flatten(2, 3), field.codes.transpose(2, 3))
    products = products.unflatten(2, (groups, -1))
    scale, zero = (x.float().movedim(3, 2).unsqueeze(3) for x in (keys.scale, keys.zero))  # [R, H, groups, 1, S]
    return (products * scale + split.sum(dim=-1, keepdim=True) * zero).sum(dim=2)


def _weighted(probs: Tensor, values: Vectors, there: Tensor, dim: int) -> Tensor:
    """sum_t p_t v_t, float32 [R, H, G, D], of probs [R, H, G, S]; p is 0 where nothing is held (bool [R, H, S])."""
    absent = ~there[..., None]
    if values.scale is None or values.zero is None:
        return torch.matmul(probs, read(values, dim).masked_fill(absent, 0))  # 0 * NaN is no 0
    scale, zero = (x.float().masked_fill_(absent, 0) for x in (values.scale, values.zero))  # [R, H, S, groups]
    weights = probs.unsqueeze(2) * scale.movedim(3, 2).unsqueeze(3)  # [R, H, groups, G, S]
    out = torch.matmul(probs, zero).repeat_interleave(dim // values.groups, dim=-1)
    group = torch.arange(dim) // (dim // values.groups)
    for field in _fields(values, dim):
        products = torch.matmul(weights.flatten(2, 3), field.codes).unflatten(2, (values.groups, -1))
        # of each channel, what the scales of its own group gave
        out[..., field.channels] += products.gather(2, group[field.channels].expand_as(products[:, :, :1])).squeeze(2)
    return out


def _per_group(x: Tensor, groups: int) -> Tensor:
    """[R, H, G, D] -> [R, H, groups, G, D], zero but for the channels of the group."""
    mask = torch.eye(groups).repeat_interleave(x.shape[-1] // groups, dim=1)
    return x.unsqueeze(2) * mask[:, None]


class Field(NamedTuple):
    """float32 codes [R, H, S, n], valid until the next field is asked for, and which n channels they are, int64."""

    codes: Tensor
    channels: Tensor


def _fields(vectors: Vectors, dim: int) -> Iterator[Field]:
    """Codes in summands: some channels at a time, at 3 bits first the lower two bits of all, then the high one."""
    if vectors.bits == 8:
        yield Field(vectors.data.float(), torch.arange(dim))
    elif vectors.bits == 3:
        low, high = vectors.data.split((dim // 8, dim // 16), dim=-1)
        yield from _plane(low.contiguous(), 2, 1)
        yield from _plane(high.contiguous(), 1, 4)
    else:
        yield from _plane(vectors.data, vectors.bits, 1)


def _plane(words: Tensor, bits: int, weight: int) -> Iterator[Field]:
    """Fields of a plane, byte by byte: a word holds channel w + W * field, its byte h the fields from h * 8 / bits on."""
    octets, per_octet, count = words.view(torch.uint8), 8 // bits, words.shape[-1]
    word = torch.arange(count)[:, None]
    shifted = torch.empty_like(octets)
    codes = torch.empty(octets.shape, dtype=torch.float32)  # used again: fresh pages cost as much as filling them
    for field in range(per_octet):
        torch.bitwise_right_shift(octets, bits * field, out=shifted)
        shifted.bitwise_and_(2**bits - 1)
        codes.copy_(shifted if weight == 1 else shifted.mul_(weight))
        channels = word + count * (field + per_octet * torch.arange(2))
        yield Field(codes, channels.flatten())
