"""Viterbi's search through a trellis of four states, in Triton. See mikv/quant/codes/trellis.py for what it computes.

A thread has a vector of its own and walks its channels, first forward, with the errors of the best paths to the four states in
registers, then backward, from the decisions that it wrote down. In torch that is a dozen launches per channel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def search(
    x_ptr, cell_ptr, nearest_ptr, within_ptr, back_ptr, out_ptr, count, cells, D: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Program (block of vectors). x fp32 [count, D]; cell int32 [count, D]: where in the table of the nearest levels a number
    lies; nearest fp32 [4, cells], within uint8 [4, cells]: the nearest level of a subset and its number in it. back: scratch
    uint8 [D, count]. out: codes uint8 [count, D]."""
    vector = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = vector < count
    vector = vector.to(tl.int64)
    stride = tl.cast(count, tl.int64)
    never = float("inf")
    # errors of the best paths whose last two bits are (the one before, the last)
    error00 = tl.zeros([BN], tl.float32)
    error01 = tl.full([BN], never, tl.float32)
    error10 = tl.full([BN], never, tl.float32)
    error11 = tl.full([BN], never, tl.float32)
    for channel in range(D):
        x = tl.load(x_ptr + vector * D + channel, mask=inside, other=0.0)
        cell = tl.load(cell_ptr + vector * D + channel, mask=inside, other=0)
        cost0 = tl.load(nearest_ptr + cell) - x
        cost1 = tl.load(nearest_ptr + cells + cell) - x
        cost2 = tl.load(nearest_ptr + 2 * cells + cell) - x
        cost3 = tl.load(nearest_ptr + 3 * cells + cell) - x
        cost0 = cost0 * cost0
        cost1 = cost1 * cost1
        cost2 = cost2 * cost2
        cost3 = cost3 * cost3
        # to (p_1, p) from (0, p_1) or from (1, p_1): subset 2 (p xor p_2) + p_1
        zero, one = cost0 + error00, cost2 + error10  # p = 0, p_1 = 0
        back = (one < zero).to(tl.int32)
        to00 = tl.minimum(zero, one)
        zero, one = cost1 + error01, cost3 + error11  # p = 0, p_1 = 1
        back |= (one < zero).to(tl.int32) << 1
        to10 = tl.minimum(zero, one)
        zero, one = cost2 + error00, cost0 + error10  # p = 1, p_1 = 0
        back |= (one < zero).to(tl.int32) << 2
        to01 = tl.minimum(zero, one)
        zero, one = cost3 + error01, cost1 + error11  # p = 1, p_1 = 1
        back |= (one < zero).to(tl.int32) << 3
        error11 = tl.minimum(zero, one)
        error00, error01, error10 = to00, to01, to10
        tl.store(back_ptr + channel * stride + vector, back.to(tl.uint8), mask=inside)
    # states are 2 p + p_1; of equal errors the first one's is taken
    state = tl.zeros([BN], tl.int32)
    least = error00
    better = error10 < least
    state, least = tl.where(better, 1, state), tl.where(better, error10, least)
    better = error01 < least
    state, least = tl.where(better, 2, state), tl.where(better, error01, least)
    state = tl.where(error11 < least, 3, state)
    tl.debug_barrier()  # decisions are written before they are read
    for i in range(D):
        channel = D - 1 - i
        back = tl.load(back_ptr + channel * stride + vector, mask=inside, other=0).to(tl.int32)
        cell = tl.load(cell_ptr + vector * D + channel, mask=inside, other=0)
        before = (back >> state) & 1
        subset = (((state >> 1) ^ before) << 1) | (state & 1)
        level = tl.load(within_ptr + subset * cells + cell).to(tl.int32)
        tl.store(out_ptr + vector * D + channel, ((level << 1) | (state >> 1)).to(tl.uint8), mask=inside)
        state = ((state & 1) << 1) | before
