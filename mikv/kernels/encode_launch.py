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


def encode_constants(dim: int, groups: int, bits: int, from_bits: int) -> dict[str, Any]:
    """Compile-time constants but the tile's tokens."""
    return {"D": dim, "NG": groups, "BITS": bits, "FROM_BITS": from_bits, "TW": tile_channels(bits, dim, groups)}


def encode_options() -> dict[str, Any]:
    """No fusion of products and sums: the result must be the reference's to the bit."""
    return {"num_warps": WARPS} if interpreted() else {"num_warps": WARPS, "enable_fp_fusion": False}


def encode(x: Tensor, bits: int, groups: int, balancer: Tensor | None = None, take: Tensor | None = None) -> Vectors:
    """As mikv.kernels.encode_reference.encode, to the bit."""
    encode_reference.check_encode(x, bits, groups, balancer, take)
    rows, heads, tokens, dim = x.shape
    count = tokens if take is None else take.shape[2]
    if bits == 16 or not tile_channels(bits, dim, groups) or not count:
        return encode_reference.encode(x, bits, groups, balancer, take)
    width, dtype = (dim, torch.uint8) if bits == 8 else (dim * bits // 16, torch.int16)
    target = Vectors(
        bits,
        torch.empty((rows, heads, count, width), dtype=dtype, device=x.device),
        torch.empty((rows, heads, count, groups), dtype=torch.float16, device=x.device),
        torch.empty((rows, heads, count, groups), dtype=torch.float16, device=x.device),
    )
    x, take = x.contiguous(), None if take is None else take.contiguous()
    _launch(Vectors(16, x), target, balancer, take, None, None, count, tokens_per_tile(bits))
    return target


def demote(
    source: Vectors,
    target: Vectors,
    take: Tensor,
    put: Tensor,
    where: Tensor | None = None,
    balancer: Tensor | None = None,
) -> None:
    """As mikv.kernels.encode_reference.demote, to the bit."""
    dim = encode_reference.check_demote(source, target, take, put, where, balancer)
    other_groups = source.bits < 16 and source.groups != target.groups
    if target.bits == 16 or other_groups or not tile_channels(target.bits, dim, target.groups):
        encode_reference.demote(source, target, take, put, where, balancer)
        return
    where = None if where is None else where.contiguous()
    _launch(source, target, balancer, take.contiguous(), put.contiguous(), where, 1, 1)


def _launch(
    source: Vectors,
    target: Vectors,
    balancer: Tensor | None,
    take: Tensor | None,
    put: Tensor | None,
    where: Tensor | None,
    count: int,
    tile: int,
) -> None:
    rows, heads, slots = target.data.shape[:3]
    dim = target.data.shape[3] if target.bits == 8 else target.data.shape[3] * 16 // target.bits
    kernels.encode[(math.ceil(count / tile), rows * heads)](
        source.data, source.scale, source.zero, None if balancer is None else balancer.contiguous(), take, put, where,
        target.data, target.scale, target.zero, source.data.shape[2], count, slots,
        **encode_constants(dim, target.groups, target.bits, source.bits), BT=tile, WIDE=interpreted(), **encode_options(),
    )  # fmt: skip
