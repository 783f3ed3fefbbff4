"""Eq. 1 of the paper: asymmetric round-to-nearest, per token, in groups of channels.

    alpha = (max x - min x) / (2^N - 1)     beta = min x     code = round((x - beta) / alpha)     x_hat = alpha code + beta

alpha and beta are stored in FP16, and the codes are fitted to that *stored* grid, so that what is read back is the
nearest point of it. The paper leaves rounding and constant groups open: ours is half-to-even; a constant group (max ==
min) is exact, because all its codes are 0 and beta is the constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP16_MAX = 65504.0
# The smallest FP16 number. A scale is never below it: a constant group must not divide by zero.
MIN_SCALE = 2.0**-24


class Quantized(NamedTuple):
    """Codes [..., D], not yet packed, in uint8 or float32; scale and zero (the minimum) FP16 [..., D / group]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(x: Tensor, bits: int, group: int) -> Quantized:
    """Quantize the last dimension of x [..., D] in groups of `group` channels; any float dtype.

    Finite input never gives NaN; what lies beyond FP16's range saturates.
    """
    levels = 2**bits - 1
    # fp32: in fp16 the range of a group may overflow, in bf16 its rounding error would be as large as a step of 8 bits
    grouped = x.to(torch.float32).unflatten(-1, (-1, group))
    # aminmax is slower
    low, high = (f(grouped, dim=-1, keepdim=True).clamp_(-FP16_MAX, FP16_MAX) for f in (torch.amin, torch.amax))
    zero = low.to(torch.float16)
    scale = ((high - zero) / levels).to(torch.float16).clamp(min=MIN_SCALE)
    # in place: fresh memory costs as much as the arithmetic
    codes = (grouped - zero.to(torch.float32)).div_(scale.to(torch.float32)).round_().clamp_(0, levels)
    return Quantized(codes.to(torch.uint8).flatten(-2), scale.squeeze(-1), zero.squeeze(-1))


def dequantize(q: Quantized) -> Tensor:
    """float32 [..., D] of `quantize`'s output. Codes in float32 are overwritten by it."""
    groups = q.scale.shape[-1]
    codes = q.codes.to(torch.float32).unflatten(-1, (groups, -1))
    x = codes.mul_(q.scale.unsqueeze(-1).float()).add_(q.zero.unsqueeze(-1).float())
    return x.clamp_(-FP16_MAX, FP16_MAX).flatten(-2)  # a scale that was rounded up may lead a little beyond
