"""Decode attention over the packed tiers of a cache, in Triton. See mikv/kernels/decode_reference.py for what it computes.

One launch per tier, split over its tokens; each program attends to a stretch of one row and KV head and leaves a partial
output and its log-sum-exp; a second kernel merges the stretches of all tiers. What makes it fast, and why:

*Rows are groups.* A tensor core's tile has 16 rows, and one KV head has 1 to 8 query heads. With two scales per vector,
row h is head h against the channels of scale 0 (its query is zero elsewhere), row h + 8 the same head against those of
scale 1. One chain of products then gives both halves, and the softmax runs on 8 rows.

*Scales stay out of the product*: q . (s c + m) = s (q . c) + m sum(q), and for values sum_t p_t (s_t c_t + m_t) =
sum_t (p_t s_t) c_t + sum_t p_t m_t. The sums of the minima are small, and done in fp32.

*Codes are operands as they lie* (mikv/kernels/layout.py). The query is scaled by a power of two so that its largest number
is about 2^14: FP16 then loses nothing when the fields' positions are divided out.

*One warp per program*, many programs per processor: probabilities go from one product into the next in registers.

*Levels* (codebooks and trellises, one scale per vector) are looked up: on NVIDIA's GPUs by byte permutations in tables that are
constants of the program (mikv/kernels/lookup.py), else in a table of 64 numbers at most, which stays in the first cache. What
comes out is an operand, and all else is as above, with one group. A trellis's level also depends on the path bits of the two
channels before: those of a whole tile come from the words one and two lanes before, read again.

Probabilities carry a power of two as well, chosen from the largest value scale of the stretch, so that p * s neither
overflows FP16 nor vanishes in it; it divides out with the softmax's denominator.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mikv.kernels.layout import Layout
from mikv.kernels.lookup import Lookup

EDGE = tl.constexpr(16)  # tokens of a tile at an end of a stretch; the least that a product takes


@triton.constexpr_function
def _tiles(bits: int, dim: int) -> int:
    return Layout(bits, dim).tiles


@triton.constexpr_function
def _width(bits: int, dim: int) -> int:
    return Layout(bits, dim).width


@triton.constexpr_function
def _row(bits: int, dim: int) -> int:
    return dim if bits == 16 else Layout(bits, dim).row  # in elements of what is stored


@triton.constexpr_function
def _shift(bits: int, dim: int, tile: int) -> int:
    return Layout(bits, dim).shift(tile)


@triton.constexpr_function
def _fold(bits: int, dim: int, tile: int) -> float:
    """Divides a tile's position out of the query."""
    return 2.0 ** -Layout(bits, dim).position(tile)


@triton.constexpr_function
def _unscale(bits: int, dim: int, tile: int) -> float:
    """What a product with a tile must be multiplied by to be one with codes (or with raw values)."""
    return 1.0 if bits == 16 else 2.0 ** (24 - Layout(bits, dim).position(tile))


@triton.constexpr_function
def _mask(bits: int, dim: int, tile: int, high: bool) -> int:
    layout = Layout(bits, dim)
    return (4 if high else 2**layout.low.bits - 1) << layout.position(tile)


@triton.constexpr_function
def _asm(bits: int, dim: int) -> str:
    return Layout(bits, dim).asm()


@triton.constexpr_function
def _constraints(bits: int, dim: int) -> str:
    return Layout(bits, dim).constraints()


@triton.constexpr_function
def _plane(bits: int, dim: int, high: bool) -> Any:
    """(bits, words, first, copies)"""
    layout = Layout(bits, dim)
    plane = layout.high if high else layout.low
    assert plane is not None
    return (plane.bits, plane.words, plane.first, plane.copies)


@triton.constexpr_function
def _stride(bits: int, dim: int) -> int:
    return Layout(bits, dim).stride


@triton.jit
def _channels(BITS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """Channels of a tile, int32 [width]."""
    lane = tl.arange(0, _width(BITS, D))
    if BITS == 8:
        return 2 * lane + TILE
    else:
        return _width(BITS, D) * TILE + lane


@triton.jit
def _words(ptr, token, inside, BITS: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr):
    """A plane's words of some tokens [BN, width], or [width, BN] where T, and the shifts of copies, int32 of that shape."""
    plane: tl.constexpr = _plane(BITS, D, HIGH)
    lane = tl.arange(0, _width(BITS, D))
    word = plane[2] + lane % plane[1] if plane[3] > 1 else plane[2] + lane
    shift = lane // plane[1] * plane[0]
    if T:
        where = word[:, None] + token[None, :] * _row(BITS, D)
        mask = inside[None, :]
        shift = shift[:, None]
    else:
        where = word[None, :] + token[:, None] * _row(BITS, D)
        mask = inside[:, None]
        shift = shift[None, :]
    words = tl.load(ptr + where, mask=mask, other=0) if MASKED else tl.load(ptr + where)
    return words, shift


@triton.jit
def _unpack(words, shift, high, high_shift, BITS: tl.constexpr, D: tl.constexpr, PTX: tl.constexpr):
    """All tiles of some words, as a tuple of FP16 tensors of their shape."""
    if PTX:
        args = [words]
        if _plane(BITS, D, False)[3] > 1:
            args = [words, tl.broadcast_to(shift, words.shape)]
        if BITS == 3:
            if _plane(BITS, D, True)[3] > 1:
                args = args + [high, tl.broadcast_to(high_shift, words.shape)]
            else:
                args = args + [high]
        if _tiles(BITS, D) == 8:
            tiles = tl.inline_asm_elementwise(
                _asm(BITS, D), _constraints(BITS, D), args, dtype=(tl.float16,) * 8, is_pure=True, pack=2
            )
        elif _tiles(BITS, D) == 4:
            tiles = tl.inline_asm_elementwise(
                _asm(BITS, D), _constraints(BITS, D), args, dtype=(tl.float16,) * 4, is_pure=True, pack=2
            )
        else:
            tiles = tl.inline_asm_elementwise(
                _asm(BITS, D), _constraints(BITS, D), args, dtype=(tl.float16,) * 2, is_pure=True, pack=2
            )
        return tiles
    else:
        low = words.to(tl.uint16, bitcast=True) >> shift.to(tl.uint16)
        tiles = ()
        for i in tl.static_range(_tiles(BITS, D)):
            bits = (low >> _shift(BITS, D, i)) & _mask(BITS, D, i, False)
            if BITS == 3:
                plane = high.to(tl.uint16, bitcast=True) >> high_shift.to(tl.uint16)
                bits = bits | (((plane >> _shift(BITS, D, i)) << 2) & _mask(BITS, D, i, True))
            tiles = tiles + (bits.to(tl.uint16).to(tl.float16, bitcast=True),)
        return tiles


@triton.jit
def _operands(
    ptr,
    token,
    inside,
    BITS: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    MASKED: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tiles of some tokens' stored vectors, ready for a product. WIDE: 16-bit values become fp32
    (the interpreter multiplies bf16 as if it were integers)."""
    if BITS == 16:
        lane = tl.arange(0, D)
        if T:
            where = lane[:, None] + token[None, :] * D
            mask = inside[None, :]
        else:
            where = lane[None, :] + token[:, None] * D
            mask = inside[:, None]
        raw = tl.load(ptr + where, mask=mask, other=0.0) if MASKED else tl.load(ptr + where)
        return ((raw.to(tl.float32) if WIDE else raw),)
    else:
        words, shift = _words(ptr, token, inside, BITS, D, False, T, MASKED)
        if BITS == 3:
            high, high_shift = _words(ptr, token, inside, BITS, D, True, T, MASKED)
            return _unpack(words, shift, high, high_shift, BITS, D, PTX)
        else:
            return _unpack(words, shift, words, shift, BITS, D, PTX)


@triton.constexpr_function
def _permuted(bits: int, dim: int) -> bool:
    return Lookup(bits, dim, True).served


@triton.constexpr_function
def _lookup(bits: int, dim: int, trellis: bool) -> str:
    return Lookup(bits, dim, trellis).asm()


@triton.constexpr_function
def _lookup_constraints(bits: int, dim: int, trellis: bool) -> str:
    return Lookup(bits, dim, trellis).constraints()


@triton.jit
def _before(ptr, token, inside, BACK: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr):
    """Words of the low plane, uint16, in which tile t shows the channels that lie BACK before those of tile t: the lanes
    before, and in front of the first lane the last ones of the tile before; nothing before channel 0."""
    width: tl.constexpr = _width(BITS, D)
    plane: tl.constexpr = _plane(BITS, D, False)
    lane = tl.arange(0, width)
    other = (lane + (width - BACK)) % width
    word = other % plane[1]
    shift = (other // plane[1] * plane[0]).to(tl.uint16)
    wraps = lane < BACK
    if T:
        where = word[:, None] + token[None, :] * _row(BITS, D)
        mask = inside[None, :]
        shift = shift[:, None]
        wraps = wraps[:, None]
    else:
        where = word[None, :] + token[:, None] * _row(BITS, D)
        mask = inside[:, None]
        shift = shift[None, :]
        wraps = wraps[None, :]
    words = (tl.load(ptr + where, mask=mask, other=0) if MASKED else tl.load(ptr + where)).to(tl.uint16, bitcast=True)
    if plane[3] > 1:
        words = words >> shift
    return tl.where(wraps, words << _stride(BITS, D), words)


@triton.jit
def _levels_by_permutation(
    ptr, token, inside, BITS: tl.constexpr, TRELLIS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr
):
    """See mikv/kernels/lookup.py: two neighbouring words at once."""
    words, shift = _words(ptr, token, inside, BITS, D, False, T, MASKED)
    args = [words]
    if _plane(BITS, D, False)[3] > 1:
        args = args + [tl.broadcast_to(shift, words.shape)]
    if BITS == 3:
        high, shift = _words(ptr, token, inside, BITS, D, True, T, MASKED)
        args = args + [high]
        if _plane(BITS, D, True)[3] > 1:
            args = args + [tl.broadcast_to(shift, words.shape)]
    if TRELLIS:
        args = args + [_before(ptr, token, inside, 1, BITS, D, T, MASKED).to(tl.int16, bitcast=True)]
        args = args + [_before(ptr, token, inside, 2, BITS, D, T, MASKED).to(tl.int16, bitcast=True)]
    text: tl.constexpr = _lookup(BITS, D, TRELLIS)
    registers: tl.constexpr = _lookup_constraints(BITS, D, TRELLIS)
    if _tiles(BITS, D) == 8:
        return tl.inline_asm_elementwise(text, registers, args, dtype=(tl.float16,) * 8, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(text, registers, args, dtype=(tl.float16,) * 4, is_pure=True, pack=2)


@triton.jit
def _levels(
    ptr,
    levels_ptr,
    token,
    inside,
    BITS: tl.constexpr,
    TRELLIS: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    MASKED: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tiles of some tokens' levels, as `_operands` gives those of their codes: FP16, FP32 where WIDE."""
    if PTX and _permuted(BITS, D):
        return _levels_by_permutation(ptr, token, inside, BITS, TRELLIS, D, T, MASKED)
    words, shift = _words(ptr, token, inside, BITS, D, False, T, MASKED)
    low = words.to(tl.uint16, bitcast=True).to(tl.int32) >> shift
    plane: tl.constexpr = _plane(BITS, D, False)
    if plane[0] < BITS:
        words, shift = _words(ptr, token, inside, BITS, D, True, T, MASKED)
        high = words.to(tl.uint16, bitcast=True).to(tl.int32) >> shift
    if TRELLIS:
        one = _before(ptr, token, inside, 1, BITS, D, T, MASKED).to(tl.int32)
        two = _before(ptr, token, inside, 2, BITS, D, T, MASKED).to(tl.int32)
    tiles = ()
    for i in tl.static_range(_tiles(BITS, D)):
        code = (low >> (_stride(BITS, D) * i)) & ((1 << plane[0]) - 1)
        if plane[0] < BITS:
            code = code | (((high >> (_stride(BITS, D) * i)) & 1) << plane[0])
        if TRELLIS:
            first = (one >> (_stride(BITS, D) * i)) & 1
            second = (two >> (_stride(BITS, D) * i)) & 1
            code = ((code >> 1) << 2) | (((code ^ second) & 1) << 1) | first
        level = tl.load(levels_ptr + code)
        tiles = tiles + ((level.to(tl.float32) if WIDE else level),)
    return tiles


@triton.jit
def _scales(ptr, token, inside, NG: tl.constexpr, MASKED: tl.constexpr):
    """Scales or minima of some tokens, FP16 [NG, 1, BN]."""
    where = ptr + tl.arange(0, NG)[None, :] + token[:, None] * NG
    x = tl.load(where, mask=inside[:, None], other=0.0) if MASKED else tl.load(where)
    return x.trans(1, 0)[:, None, :]


@triton.jit
def _stretch(
    first,
    query,
    zero_query,
    state,
    low,
    high,
    pointers,
    unit,
    lift,
    bias,
    G: tl.constexpr,
    D: tl.constexpr,
    NG: tl.constexpr,
    MH: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_CODE: tl.constexpr,
    V_CODE: tl.constexpr,
    BN: tl.constexpr,
    EMIT: tl.constexpr,
    MASKED: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attend to BN tokens from `first` on. state = (running maximum, denominator, sums of minima, accumulators)."""
    (key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr, shift_ptr, logits_ptr, tokens) = pointers
    maximum, denominator, zeros, acc = state
    M: tl.constexpr = NG * MH
    token = first + tl.arange(0, BN)
    inside = (token >= low) & (token < high)

    if K_CODE == "codebook" or K_CODE == "trellis":
        keys = _levels(key_ptr, key_zero_ptr, token, inside, K_BITS, K_CODE == "trellis", D, True, MASKED, PTX, WIDE)
    else:
        keys = _operands(key_ptr, token, inside, K_BITS, D, True, MASKED, PTX, WIDE)
    logits = tl.zeros([M, BN], tl.float32)
    for i in tl.static_range(_tiles(K_BITS, D)):
        logits = tl.dot(query[i], keys[i], logits)
    logits = tl.reshape(logits, [NG, MH, BN])
    if K_BITS < 16:
        logits = logits * _scales(key_scale_ptr, token, inside, NG, MASKED).to(tl.float32)
        if K_CODE == "affine":
            logits += _scales(key_zero_ptr, token, inside, NG, MASKED).to(tl.float32) * zero_query
    logits = tl.sum(logits, axis=0)  # [MH, BN], in units that `unit` turns into powers of two
    if shift_ptr is not None:
        head = tl.arange(0, MH)[:, None]
        wanted = (head < G) & inside[None, :] if MASKED else head < G
        logits += tl.load(shift_ptr + head * tokens + token[None, :], mask=wanted, other=0.0) * lift
    if MASKED:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    if EMIT:
        head = tl.arange(0, MH)[:, None]
        wanted = (head < G) & inside[None, :] if MASKED else head < G
        tl.store(logits_ptr + head * tokens + token[None, :], logits * unit, mask=wanted)

    new_maximum = tl.maximum(maximum, tl.max(logits, axis=1) * unit)
    p = tl.exp2(logits * unit - (new_maximum - bias)[:, None])
    fade = tl.exp2(maximum - new_maximum)
    denominator = denominator * fade + tl.sum(p, axis=1)
    if V_BITS < 16:
        if V_CODE == "affine":
            zero = _scales(value_zero_ptr, token, inside, NG, MASKED).to(tl.float32)
            zeros = zeros * fade[None, :] + tl.sum(p[None, :, :] * zero, axis=2)
        weights = p.to(tl.float16)[None, :, :] * _scales(value_scale_ptr, token, inside, NG, MASKED)
    elif WIDE:
        weights = tl.broadcast_to(p[None, :, :], [NG, MH, BN])
    else:
        weights = tl.broadcast_to(p.to(value_ptr.dtype.element_ty)[None, :, :], [NG, MH, BN])
    weights = tl.reshape(weights, [M, BN])
    if V_CODE == "codebook" or V_CODE == "trellis":
        values = _levels(value_ptr, value_zero_ptr, token, inside, V_BITS, V_CODE == "trellis", D, False, MASKED, PTX, WIDE)
    else:
        values = _operands(value_ptr, token, inside, V_BITS, D, False, MASKED, PTX, WIDE)
    fade = tl.reshape(tl.broadcast_to(fade[None, :], [NG, MH]), [M])[:, None]
    added = ()
    for i in tl.static_range(_tiles(V_BITS, D)):
        added = added + (tl.dot(weights, values[i], acc[i] * fade),)
    return new_maximum, denominator, zeros, added


@triton.jit(do_not_specialize=["first_split", "splits"])
def attend(
    query_ptr,
    balancer_ptr,
    key_ptr,
    key_scale_ptr,
    key_zero_ptr,
    value_ptr,
    value_scale_ptr,
    value_zero_ptr,
    stop_ptr,
    shift_ptr,
    out_ptr,
    lse_ptr,
    logits_ptr,
    scaling,
    slots,
    split_tokens,
    first_split,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    NG: tl.constexpr,
    MH: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_CODE: tl.constexpr,
    V_CODE: tl.constexpr,
    BN: tl.constexpr,
    SCALES: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (split, row * heads + head). G query heads per KV head, MH of them in a tile with padding, NG groups.

    query [R, Hq, D]; balancer fp32 [R, H, D] or None; keys, values: raw [R, H, S, D] or int16 words [R, H, S, words];
    scales, minima fp16 [R, H, S, NG], in the place of minima levels fp16 [n]; stop int32 [R, H]; shift fp32 [R, Hq, S] or None;
    out fp32 [R, Hq, splits, D], lse fp32 [R, Hq, splits] (base 2), logits fp32 [R, Hq, S] (base 2) or None. scaling is that of
    logits in base 2. K_CODE, V_CODE: raw, affine, codebook or trellis.
    """
    M: tl.constexpr = NG * MH
    GROUP: tl.constexpr = D // NG
    split = tl.program_id(0)
    pair = tl.program_id(1)
    low = split * split_tokens
    high = tl.minimum(low + split_tokens, tl.load(stop_ptr + pair))

    # the query, one tile at a time: rows are (group, head), zero outside the row's group
    row = tl.arange(0, M)
    head = row % MH
    group = row // MH
    largest = 0.0
    raw = ()
    for i in tl.static_range(_tiles(K_BITS, D)):
        channel = _channels(K_BITS, D, i)
        mine = (head < G)[:, None] & ((channel // GROUP)[None, :] == group[:, None])
        q = tl.load(query_ptr + (pair * G + head)[:, None] * D + channel[None, :], mask=mine, other=0.0)
        if balancer_ptr is not None:
            q = tl.fdiv(q.to(tl.float32), tl.load(balancer_ptr + pair * D + channel)[None, :])
        largest = tl.maximum(largest, tl.max(tl.abs(q.to(tl.float32))))
        raw = raw + (q,)
    unit = scaling
    query = ()
    zero_query = tl.zeros([M], tl.float32)
    if K_BITS == 16:
        for i in tl.static_range(_tiles(K_BITS, D)):
            query = query + (raw[i].to(tl.float32) if WIDE else raw[i].to(key_ptr.dtype.element_ty),)
    else:
        # a power of two that brings the largest number between 2^14 and 2^15
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 64)
        grow = ((127 + 14 + 127 - exponent) << 23).to(tl.float32, bitcast=True)
        shrink = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        for i in tl.static_range(_tiles(K_BITS, D)):
            q = (raw[i].to(tl.float32) * grow).to(tl.float16).to(tl.float32)
            zero_query += tl.sum(q, axis=1)
            if K_CODE == "affine":
                query = query + ((q * _fold(K_BITS, D, i)).to(tl.float16),)
            else:
                query = query + ((q if WIDE else q.to(tl.float16)),)
        unit = scaling * shrink
        if K_CODE == "affine":
            unit *= 16777216.0
            zero_query *= 1.0 / 16777216.0
    lift = tl.fdiv(scaling, unit)  # from logits to their unit
    zero_query = tl.reshape(zero_query, [NG, MH, 1])

    base = pair.to(tl.int64) * slots
    key_ptr += base * _row(K_BITS, D)
    value_ptr += base * _row(V_BITS, D)
    if K_BITS < 16:
        key_scale_ptr += base * NG
    if K_CODE == "affine":
        key_zero_ptr += base * NG
    bias = 8.0
    if V_BITS < 16:
        value_scale_ptr += base * NG
        if V_CODE == "affine":
            value_zero_ptr += base * NG
        largest_scales = tl.zeros([SCALES], tl.float16)
        for first in range(low * NG, high * NG, SCALES):
            place = first + tl.arange(0, SCALES)
            scales = tl.load(value_scale_ptr + place, mask=place < high * NG, other=0.0)
            largest_scales = tl.maximum(largest_scales, scales)
        largest_scale = tl.max(largest_scales).to(tl.float32)
        # p * s <= 2^bias * s < 2^15; and p itself, at most 2^bias, is an FP16 number too
        bias = tl.minimum(14 + 127 - ((largest_scale.to(tl.int32, bitcast=True) >> 23) & 255), 15).to(tl.float32)
    if logits_ptr is not None:
        logits_ptr += pair.to(tl.int64) * G * slots
    if shift_ptr is not None:
        shift_ptr += pair.to(tl.int64) * G * slots
    pointers = (key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr, shift_ptr, logits_ptr, slots)

    acc = ()
    for _ in tl.static_range(_tiles(V_BITS, D)):
        acc = acc + (tl.zeros([M, _width(V_BITS, D)], tl.float32),)
    maximum = tl.full([MH], float("-inf"), tl.float32)
    denominator = tl.zeros([MH], tl.float32)
    zeros = tl.zeros([NG, MH], tl.float32)

    # What fills no whole tile comes first, masked and in small tiles: the long loop then needs no mask, and the masked one
    # no more registers than it.
    body = (low + BN - 1) // BN * BN
    tail = tl.maximum(high // BN * BN, body)
    ahead = tl.maximum(tl.cdiv(tl.minimum(body, high) - low // EDGE * EDGE, EDGE), 0)
    behind = tl.maximum(tl.cdiv(high - tail, EDGE), 0)
    edges = tl.where(low < high, ahead + behind, 0)
    for edge in tl.range(0, edges, num_stages=1):
        first = tl.where(edge < ahead, low // EDGE * EDGE + edge * EDGE, tail + (edge - ahead) * EDGE)
        state = (maximum, denominator, zeros, acc)
        maximum, denominator, zeros, acc = _stretch(
            first, query, zero_query, state, low, high, pointers, unit, lift, bias,
            G, D, NG, MH, K_BITS, V_BITS, K_CODE, V_CODE, EDGE, logits_ptr is not None, True, PTX, WIDE,
        )  # fmt: skip
    for first in tl.range(body, high // BN * BN, BN, num_stages=STAGES):
        first = tl.multiple_of(first, BN)
        state = (maximum, denominator, zeros, acc)
        maximum, denominator, zeros, acc = _stretch(
            first, query, zero_query, state, low, high, pointers, unit, lift, bias,
            G, D, NG, MH, K_BITS, V_BITS, K_CODE, V_CODE, BN, logits_ptr is not None, False, PTX, WIDE,
        )  # fmt: skip

    # an empty stretch leaves zeros and a log-sum-exp of -inf
    some = denominator > 0
    denominator = tl.where(some, denominator, 1.0)
    share = tl.where(some, 1.0 / denominator, 0.0)
    share = tl.reshape(tl.broadcast_to(share[None, :], [NG, MH]), [M])[:, None]
    zeros_of_row = tl.reshape(zeros, [M])[:, None]
    place = (pair * G + head).to(tl.int64) * splits + first_split + split
    for i in tl.static_range(_tiles(V_BITS, D)):
        channel = _channels(V_BITS, D, i)
        mine = (head < G)[:, None] & ((channel // GROUP)[None, :] == group[:, None])
        tl.store(
            out_ptr + place[:, None] * D + channel[None, :],
            (acc[i] * (_unscale(V_BITS, D, i) if V_CODE == "affine" else 1.0) + zeros_of_row) * share,
            mask=mine,
        )
    one = tl.arange(0, MH)
    place = (pair * G + one).to(tl.int64) * splits + first_split + split
    tl.store(lse_ptr + place, tl.where(some, maximum + tl.log2(denominator) - bias, float("-inf")), mask=one < G)


@triton.jit(do_not_specialize=["splits"])
def merge(parts_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, D: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row * Hq + head): parts fp32 [R * Hq, splits, D] weighted by their log-sum-exps (base 2) -> out [R * Hq, D],
    lse fp32 [R * Hq]. A few splits at a time: all of them would not fit in registers."""
    pair = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    maximum = float("-inf")
    denominator = 0.0
    total = tl.zeros([D], tl.float32)
    for first in range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        lse = tl.load(part_lse_ptr + pair * splits + split, mask=split < splits, other=float("-inf"))
        part = tl.load(
            parts_ptr + (pair * splits + split)[:, None] * D + channel[None, :], mask=(split < splits)[:, None], other=0.0
        )
        new = tl.maximum(maximum, tl.max(lse, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing yet: -inf - -inf is no number
        weight = tl.exp2(lse - safe)
        fade = tl.exp2(maximum - safe)
        denominator = denominator * fade + tl.sum(weight, axis=0)
        total = total * fade + tl.sum(part * weight[:, None], axis=0)
        maximum = new
    some = denominator > 0
    denominator = tl.where(some, denominator, 1.0)
    tl.store(out_ptr + pair * D + channel, (total / denominator).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + pair, tl.where(some, maximum + tl.log2(denominator), float("-inf")))


@triton.jit(do_not_specialize=["slots"])
def mass(logits_ptr, lse_ptr, stop_ptr, mass_ptr, slots, G: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of slots, row * heads + head): probabilities from logits fp32 [R, Hq, S] and lse fp32 [R, Hq] (both
    base 2), summed over a group -> mass fp32 [R, H, S]."""
    pair = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < tl.load(stop_ptr + pair)
    total = tl.zeros([BLOCK], tl.float32)
    for g in range(G):
        query_head = (pair * G + g).to(tl.int64)
        logits = tl.load(logits_ptr + query_head * slots + slot, mask=inside, other=float("-inf"))
        lse = tl.load(lse_ptr + query_head)
        total += tl.exp2(logits - tl.where(lse == float("-inf"), 0.0, lse))
    tl.store(mass_ptr + pair.to(tl.int64) * slots + slot, tl.where(inside, total, 0.0), mask=slot < slots)
