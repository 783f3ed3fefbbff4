"""Launches the Triton kernels of column sums."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mikv.kernels.columns_reference import check_columns
from mikv.kernels.jit import columns as kernels
from mikv.kernels.launch import compiler_options, interpreted

TILE = 128  # keys, and queries, of a tile
# Four warps where one instruction multiplies for all of them (from sm_90 on): two programs then share a processor, and the
# products of one run beside the exponentials of the other. Elsewhere four would spill registers.
WARPS, WARPS_BEFORE_SM_90 = 4, 8
STAGES = 2


def columns_constants(group_heads: int, dim: int) -> dict[str, Any]:
    """Compile-time constants of both kernels but WIDE."""
    return {"G": group_heads, "D": dim, "BK": TILE, "BQ": TILE, "STAGES": STAGES}


def column_sums(query: Tensor, key: Tensor, lse: Tensor, scaling: float, padding: Tensor | None = None) -> Tensor:
    """As mikv.kernels.columns_reference.column_sums; products of 16-bit numbers, sums in FP32."""
    check_columns(query, key, padding, lse)
    batch, heads, tokens, _ = key.shape
    sums = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    if tokens:
        kernels.column_sums[(math.ceil(tokens / TILE), batch * heads)](
            query.contiguous(), key.contiguous(), lse.contiguous() * math.log2(math.e), padding, sums,
            scaling * math.log2(math.e), heads, tokens, **_options(query, key),
        )  # fmt: skip
    return sums


def log_sum_exp(query: Tensor, key: Tensor, scaling: float, padding: Tensor | None = None) -> Tensor:
    """As mikv.kernels.columns_reference.log_sum_exp."""
    check_columns(query, key, padding)
    batch, query_heads, tokens, _ = query.shape
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if tokens:
        kernels.log_sum_exp[(math.ceil(tokens / TILE), batch * query_heads)](
            query.contiguous(), key.contiguous(), padding, lse,
            scaling * math.log2(math.e), query_heads, tokens, **_options(query, key),
        )  # fmt: skip
    return lse


def _warps(device: torch.device) -> int:
    modern = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return WARPS if modern else WARPS_BEFORE_SM_90


def _options(query: Tensor, key: Tensor) -> dict[str, Any]:
    constants = columns_constants(query.shape[1] // key.shape[1], query.shape[3])
    wide = interpreted() and query.dtype == torch.bfloat16  # the interpreter multiplies bf16 as if it were integers
    return {**constants, "WIDE": wide, "num_warps": _warps(query.device), "num_stages": STAGES, **compiler_options()}
