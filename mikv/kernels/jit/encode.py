"""Balance, quantize and pack, in Triton. See mikv/kernels/encode_reference.py for what is computed, to the bit.

A vector is read in as many tiles as a word has fields, so that packing them is element-wise: no number crosses a thread.
Where tokens come from and where they go may be given by index: sorting a prompt into tiers, and moving one token from
tier to tier, is then the same kernel.

Equal to the bit means: no product is fused into a sum unless it says so here (the launch switches that off), rounding is
half to even (adding 2^23 does it, and leaves the integer in the low bits), and quotients are rounded as IEEE says. A division
does that too, in ten instructions. Two do: with 1 / s as a sum of two numbers, a + b, the quotient is fma(x, a, x * b). Its
error before the one rounding is about 2^-46 of it. x has 24 bits and s 11 (or fewer), so a quotient that is no FP32 number,
nor half-way between two, is at least 2^-36 away from any that is half-way: the rounding can't go wrong, even if a is a few
units off. (tests/kernels/test_encode.py tries it with such an a.)
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
MIN_SCALE = tl.constexpr(2.0**-24)
INTEGER = tl.constexpr(2.0**23)  # from here on, an FP32 number's low bits are an integer


@triton.constexpr_function
def _inverse(levels: int, term: int) -> float:
    """1 / levels as a sum of two FP32 numbers."""
    first = float(np.float32(1.0) / np.float32(levels))
    return first if term == 1 else float(np.float32(1.0 / levels - first))


@triton.jit
def _fma(x, y, z, WIDE: tl.constexpr):
    """x * y + z with one rounding. WIDE: by way of float64, for interpreters whose fma rounds twice (before Triton 3.9)."""
    if WIDE:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def encode(
    source_ptr,
    balancer_ptr,
    data_ptr,
    scale_ptr,
    zero_ptr,
    count,
    D: tl.constexpr,
    NG: tl.constexpr,
    BITS: tl.constexpr,
    TW: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (tile of tokens, row * heads + head).

    source: [R, H, count, D] in any float type; balancer fp32 [R, H, D] or None. data: words (bytes at 8 bits)
    [R, H, count, ...], scale, zero fp16 [R, H, count, NG]. TW: channels of a tile, those of one field of a word (half of a
    field's at 3 bits; one group's at 8), at most those of a group.
    """
    pair = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < count
    token = tl.where(inside, token, 0)
    target = pair * count + token
    source_ptr += pair * count * D
    if balancer_ptr is not None:
        balancer_ptr += pair * D

    levels: tl.constexpr = (1 << BITS) - 1
    per_group: tl.constexpr = D // NG // TW  # tiles
    words = ()
    for g in tl.static_range(NG):
        tiles = ()
        for i in tl.static_range(per_group):
            channel = (g * per_group + i) * TW + tl.arange(0, TW)
            x = tl.load(source_ptr + token[:, None] * D + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
            if balancer_ptr is not None:
                x = x * tl.load(balancer_ptr + channel)[None, :]
            tiles = tiles + (x,)
        low = tiles[0]
        high = tiles[0]
        for i in tl.static_range(1, per_group):
            low = tl.minimum(low, tiles[i])
            high = tl.maximum(high, tiles[i])
        # the extremes are clamped instead of every number: what lies beyond gets the extreme's code in any case
        least = tl.minimum(tl.maximum(tl.min(low, axis=1), -FP16_MAX), FP16_MAX)
        most = tl.minimum(tl.maximum(tl.max(high, axis=1), -FP16_MAX), FP16_MAX)
        zero = least.to(tl.float16)
        offset = zero.to(tl.float32)
        spread = most - offset
        inverse = tl.full([BT], _inverse(levels, 1), tl.float32)
        step = _fma(spread, inverse, spread * _inverse(levels, 2), WIDE)
        scale = tl.maximum(step.to(tl.float16).to(tl.float32), MIN_SCALE)
        tl.store(scale_ptr + target * NG + g, scale.to(tl.float16), mask=inside)
        tl.store(zero_ptr + target * NG + g, zero, mask=inside)
        inverse = 1.0 / scale
        rest = (_fma(-scale, inverse, tl.full([BT], 1.0, tl.float32), WIDE) * inverse)[:, None]
        inverse = tl.broadcast_to(inverse[:, None], [BT, TW])
        for i in tl.static_range(per_group):
            distance = tiles[i] - offset[:, None]
            quotient = _fma(distance, inverse, distance * rest, WIDE)
            code = tl.minimum(tl.maximum(quotient, 0.0), levels) + INTEGER
            words = words + (code.to(tl.int32, bitcast=True),)

    if BITS == 8:
        for i in tl.static_range(D // TW):
            where = target[:, None] * D + i * TW + tl.arange(0, TW)[None, :]
            tl.store(data_ptr + where, words[i].to(tl.uint8), mask=inside[:, None])
    elif BITS == 3:
        # Tile i is half a field of the low plane (two bits) and a whole one of the high plane (one bit). Codes are added up
        # whole, two bits apart; then their high bits, added up likewise, are taken out again: cheaper than two masks.
        even = tl.zeros([BT, TW], tl.int32)
        odd = tl.zeros([BT, TW], tl.int32)
        even_high = tl.zeros([BT, TW], tl.int32)
        odd_high = tl.zeros([BT, TW], tl.int32)
        for i in tl.static_range(8):
            even += words[2 * i] << (2 * i)
            odd += words[2 * i + 1] << (2 * i)
            even_high += (words[2 * i] & 4) << (2 * i)
            odd_high += (words[2 * i + 1] & 4) << (2 * i)
        even -= even_high
        odd -= odd_high
        plane = (even_high >> 2) | (odd_high >> 1)
        where = data_ptr + target[:, None] * (3 * TW) + tl.arange(0, TW)[None, :]
        tl.store(where, even.to(tl.int16), mask=inside[:, None])
        tl.store(where + TW, odd.to(tl.int16), mask=inside[:, None])
        tl.store(where + 2 * TW, plane.to(tl.int16), mask=inside[:, None])
    else:
        word = words[0]
        for i in tl.static_range(1, 16 // BITS):
            word += words[i] << (BITS * i)  # what stands above the code falls off: 2^23 leaves the low 16 bits alone
        where = target[:, None] * TW + tl.arange(0, TW)[None, :]
        tl.store(data_ptr + where, word.to(tl.int16), mask=inside[:, None])
