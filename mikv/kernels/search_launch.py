"""Launches the Triton kernel that searches a trellis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mikv.kernels.jit import search as kernels
from mikv.kernels.launch import interpreted

VECTORS = 64  # of a program: few, so that not many vectors spread over processors
WARPS = VECTORS // 32  # a thread per vector


def search_options() -> dict[str, Any]:
    """No fusion of products and sums: the result must be the reference's to the bit."""
    return {"num_warps": WARPS} if interpreted() else {"num_warps": WARPS, "enable_fp_fusion": False}


def search(x: Tensor, cell: Tensor, nearest: Tensor, within: Tensor) -> Tensor:
    """As mikv.quant.codes.trellis.walk, to the bit: x float32 [N, D], cell int32 [N, D], nearest float32 [4, cells], within
    uint8 [4, cells] -> codes uint8 [N, D]."""
    count, dim = x.shape
    out = torch.empty((count, dim), dtype=torch.uint8, device=x.device)
    if count:
        kernels.search[(math.ceil(count / VECTORS),)](
            x.contiguous(), cell.contiguous(), nearest.contiguous(), within.contiguous(), out.new_empty((dim, count)), out,
            count, nearest.shape[1], D=dim, BN=VECTORS, **search_options(),
        )  # fmt: skip
    return out
