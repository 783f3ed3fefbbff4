"""Storing vectors in few bits, in torch: balance, quantize and pack a prompt's keys or values. The Triton kernel has the same
signature and gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mikv.kernels.segments import PACKED_BITS, Vectors
from mikv.quant.codes.affine import Affine


def encode(x: Tensor, bits: int, groups: int, balancer: Tensor | None = None) -> Vectors:
    """Store exact vectors at `bits` bits.

    Args:
        x: [R, H, T, D], any float dtype; finite.
        bits: 8, 4, 3 or 2.
        groups: scales per vector; divides D.
        balancer: float32 [R, H, D], multiplied in before; None = nothing.

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    check_encode(x, bits, groups, balancer)
    if balancer is not None:
        x = x.float() * balancer[:, :, None]
    parts = Affine(bits, x.shape[-1] // groups).encode(x, torch.float16)
    return Vectors(bits, parts["codes"], parts["scale"], parts["zero"])


def check_encode(x: Tensor, bits: int, groups: int, balancer: Tensor | None) -> None:
    """Refuse what a kernel would misread."""
    rows, heads, _, dim = x.shape
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits} bits; choose from {', '.join(map(str, PACKED_BITS))}")
    if groups < 1 or dim % groups:
        raise ValueError(f"{groups} scales can't share {dim} channels evenly")
    if balancer is not None and (balancer.dtype != torch.float32 or balancer.shape != (rows, heads, dim)):
        raise ValueError(f"balancer must be float32 {[rows, heads, dim]}")
