"""Launches the Triton kernel that balances, quantizes and packs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mikv.kernels import encode_reference
from mikv.kernels.jit import encode as kernels
from mikv.kernels.launch import interpreted
from mikv.kernels.segments import Vectors

WARPS = 4


def tile_channels(bits: int, dim: int, groups: int) -> int:
    """Channels of a tile: what one field of all words holds (3 bits: of the high plane; 8: one group). 0 = the kernel can't:
    fields would straddle groups."""
    channels = dim // groups if bits == 8 else dim // {4: 4, 3: 16, 2: 8}[bits]
    power_of_two = dim & (dim - 1) == 0 and channels > 0
    return channels if power_of_two and channels <= dim // groups else 0


def tokens_per_tile(bits: int) -> int:
    """3-bit codes need more instructions to pack; a larger tile shares out what comes before."""
    return 128 if bits == 3 else 64


def encode_constants(dim: int, groups: int, bits: int) -> dict[str, Any]:
    """Compile-time constants but the tile's tokens."""
    return {"D": dim, "NG": groups, "BITS": bits, "TW": tile_channels(bits, dim, groups)}


def encode_options() -> dict[str, Any]:
    """No fusion of products and sums: the result must be the reference's to the bit."""
    return {"num_warps": WARPS} if interpreted() else {"num_warps": WARPS, "enable_fp_fusion": False}


def encode(x: Tensor, bits: int, groups: int, balancer: Tensor | None = None) -> Vectors:
    """As mikv.kernels.encode_reference.encode, to the bit."""
    encode_reference.check_encode(x, bits, groups, balancer)
    rows, heads, count, dim = x.shape
    if not tile_channels(bits, dim, groups) or not count:
        return encode_reference.encode(x, bits, groups, balancer)
    width, dtype = (dim, torch.uint8) if bits == 8 else (dim * bits // 16, torch.int16)
    data = torch.empty((rows, heads, count, width), dtype=dtype, device=x.device)
    scale, zero = (torch.empty((rows, heads, count, groups), dtype=torch.float16, device=x.device) for _ in range(2))
    tile = tokens_per_tile(bits)
    kernels.encode[(math.ceil(count / tile), rows * heads)](
        x.contiguous(), None if balancer is None else balancer.contiguous(), data, scale, zero, count,
        **encode_constants(dim, groups, bits), BT=tile, WIDE=interpreted(), **encode_options(),
    )  # fmt: skip
    return Vectors(bits, data, scale, zero)
