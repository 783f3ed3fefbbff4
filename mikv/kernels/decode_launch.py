"""Launches the Triton kernels of decode attention: how a tier is cut into stretches, and which shape of tile it gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mikv.kernels import lookup
from mikv.kernels.jit import decode as kernels
from mikv.kernels.launch import compiler_options, interpreted, processors
from mikv.kernels.segments import Attention, Segment, Vectors, check_segments

# Programs per processor that hide the latency of memory: what fits at about 170 registers per thread and one warp.
PROGRAMS_PER_PROCESSOR = 12
# Tokens of the shortest stretch: below it, the query's preparation costs as much as the tokens.
SHORTEST = 256
# At most so many registers per thread of a one-warp program: nine programs then share a processor. It is the assembler's own
# choice of less, made for more programs, that would spill a few.
REGISTERS = 224
MERGED_AT_ONCE = 16
# Value scales of a stretch that are looked through at once for the largest: many loads under way, no shuffle between them.
SCALES_AT_ONCE = 1024
MASS_BLOCK = 256


class Tile(NamedTuple):
    """Tokens of a tile, warps of a program, tiles under way."""

    tokens: int
    warps: int
    stages: int


def tile(key_bits: int, value_bits: int, looked_up: bool = False) -> Tile:
    """Chosen by the compiler's own figures (scripts/inspect_kernels.py): fewest instructions without a spill.

    One warp keeps probabilities in registers between the two products. 16-bit tiles are so large that two warps share
    them. Wide codes have two tiles under way: a third would cost programs, and more bytes are under way already. Looking
    levels up takes many registers: tiles are half as long, and where a table in memory is asked, shared by two warps.
    """
    bits = [bits for bits in (key_bits, value_bits) if bits < 16]
    if looked_up and not set(bits) <= set(lookup.BITS):
        return Tile(32, 2, 2)
    if looked_up:
        return Tile(32, 1, 2 if max(bits) >= 4 else 3)
    if key_bits == value_bits == 16:
        return Tile(64, 2, 2)
    return Tile(64, 1, 2 if max(key_bits, value_bits) >= 4 else 3)


def padded_heads(group_heads: int, groups: int) -> int:
    """Query heads of a KV head, padded so that heads x groups fill the 16 rows of a tensor core's tile."""
    return max(16 // groups, 2 ** math.ceil(math.log2(group_heads)))


def decode_constants(
    group_heads: int, dim: int, groups: int, key_bits: int, value_bits: int, kinds: tuple[str, str] | None = None
) -> dict[str, Any]:
    """The kernel's compile-time constants but PTX and WIDE, which depend on where it runs. kinds: of keys and values, see
    Vectors.kind; None = raw at 16 bits, else affine."""
    codes = kinds or tuple("raw" if bits == 16 else "affine" for bits in (key_bits, value_bits))
    shape = tile(key_bits, value_bits, _looked_up(codes))
    return {
        "G": group_heads,
        "D": dim,
        "NG": groups,
        "MH": padded_heads(group_heads, groups),
        "K_BITS": key_bits,
        "V_BITS": value_bits,
        "K_CODE": codes[0],
        "V_CODE": codes[1],
        "BN": shape.tokens,
        "SCALES": SCALES_AT_ONCE,
        "STAGES": shape.stages,
    }


def _looked_up(kinds: Sequence[str]) -> bool:
    return not {"codebook", "trellis"}.isdisjoint(kinds)


def decode_options(
    key_bits: int, value_bits: int, nvidia: bool, kinds: tuple[str, str] = ("affine", "affine")
) -> dict[str, Any]:
    """How the kernel is compiled."""
    shape = tile(key_bits, value_bits, _looked_up(kinds))
    registers = {"maxnreg": REGISTERS} if nvidia and shape.warps == 1 else {}
    return {"num_warps": shape.warps, "num_stages": shape.stages, **registers, **compiler_options()}


def decode_attention(query: Tensor, segments: Sequence[Segment], scaling: float, split_tokens: int | None = None) -> Attention:
    """As mikv.kernels.decode_reference.decode_attention; products in FP16 (BF16 where 16-bit vectors are), sums in FP32.

    split_tokens: length of a stretch, a multiple of 64; None = so that the GPU is full.
    """
    check_segments(query, segments)
    if any(x.data.dtype == torch.float32 for segment in segments for x in (segment.keys, segment.values)):
        raise ValueError("the kernel takes 16-bit vectors as FP16 or BF16; for FP32 there is the reference")
    query = query.contiguous()
    rows, query_heads, dim = query.shape
    lengths = [split_tokens or _stretch(rows * s.keys.data.shape[1], s.slots, query.device) for s in segments]
    counts = [math.ceil(segment.slots / length) for segment, length in zip(segments, lengths, strict=True)]
    splits = sum(counts)
    parts = torch.empty((rows, query_heads, splits, dim), dtype=torch.float32, device=query.device)
    part_lse = torch.empty((rows, query_heads, splits), dtype=torch.float32, device=query.device)
    logits: list[Tensor | None] = []
    first = 0
    for segment, length, count in zip(segments, lengths, counts, strict=True):
        logits.append(parts.new_empty((rows, query_heads, segment.slots)) if segment.wants_mass else None)
        if count:
            _attend(query, segment, scaling, length, first, count, parts, part_lse, logits[-1])
            if segment.output is not None:
                _turn(segment, parts[:, :, first : first + count])
        first += count
    out, lse = torch.empty_like(query), part_lse.new_empty((rows, query_heads))
    kernels.merge[(rows * query_heads,)](
        parts, part_lse, out, lse, splits, D=dim, BLOCK=MERGED_AT_ONCE, num_warps=4, **compiler_options()
    )  # fmt: skip
    return Attention(out, [None if x is None else _mass(s, x, lse) for s, x in zip(segments, logits, strict=True)])


def _attend(
    query: Tensor,
    segment: Segment,
    scaling: float,
    length: int,
    first: int,
    count: int,
    parts: Tensor,
    part_lse: Tensor,
    logits: Tensor | None,
) -> None:
    keys, values = segment.keys, segment.values
    query = query if segment.query is None else segment.query.contiguous()
    heads, slots = keys.data.shape[1:3]
    shift = segment.shift
    if shift is not None:
        shift = shift.expand(-1, -1, query.shape[1] // heads, slots).contiguous()
    kinds = (keys.kind, values.kind)
    constants = decode_constants(query.shape[1] // heads, query.shape[2], segment.groups, keys.bits, values.bits, kinds)
    constants["PTX"] = query.is_cuda and torch.version.hip is None
    constants["WIDE"] = interpreted() and torch.bfloat16 in (keys.data.dtype, values.data.dtype)
    kernels.attend[(count, query.shape[0] * heads)](
        query, segment.balancer, _words(keys), keys.scale, _table(keys), _words(values), values.scale, _table(values),
        segment.stop, shift, parts, part_lse, logits,
        scaling * math.log2(math.e), slots, length, first, parts.shape[2],
        **constants, **decode_options(keys.bits, values.bits, constants["PTX"], kinds),
    )  # fmt: skip


def _mass(segment: Segment, logits: Tensor, lse: Tensor) -> Tensor:
    rows, heads, slots = segment.keys.data.shape[:3]
    mass = lse.new_empty((rows, heads, slots))
    if slots:
        kernels.mass[(math.ceil(slots / MASS_BLOCK), rows * heads)](
            logits, lse, segment.stop, mass, slots,
            G=lse.shape[1] // heads, BLOCK=MASS_BLOCK, num_warps=4, **compiler_options(),
        )  # fmt: skip
    return mass


def _turn(segment: Segment, parts: Tensor) -> None:
    """Undo what was done to values, for each stretch's mean value [R, Hq, stretches, D], in place: it is linear, so that it may
    come before stretches are merged."""
    assert segment.output is not None
    mine = parts.unflatten(1, (segment.keys.data.shape[1], -1)).flatten(2, 3)  # [R, H, G * stretches, D]
    parts.copy_(segment.output(mine, torch.ones_like(mine[..., :1])).reshape(parts.shape))


def _table(vectors: Vectors) -> Tensor | None:
    """Minima, or in their place levels, FP16: operands of a product."""
    return vectors.zero if vectors.levels is None else vectors.levels.half()


def _words(vectors: Vectors) -> Tensor:
    """8-bit codes as 16-bit words of two."""
    return vectors.data.view(torch.int16) if vectors.bits == 8 else vectors.data


def _stretch(pairs: int, slots: int, device: torch.device) -> int:
    """Tokens per program, a multiple of every tile: programs fill the processors once, if the cache is large enough."""
    wanted = math.ceil(PROGRAMS_PER_PROCESSOR * processors(device) / pairs)
    return max(SHORTEST, math.ceil(slots / wanted / 64) * 64)
