"""The kernels' public functions: torch references on the CPU, Triton on a GPU, or whichever is asked for.

`implementation` is None (by the device of the query), `reference` or `triton`. Signatures and results are the references'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mikv.kernels import columns_reference, decode_cpu, decode_reference, encode_reference
from mikv.kernels.launch import interpreted
from mikv.kernels.segments import Attention, Segment, Vectors
from mikv.options import IMPLEMENTATIONS, check_choice


def picked(device: torch.device, implementation: str | None = None, dim: int = 64) -> str:
    """Which implementation runs on a device, for heads of `dim` channels.

    Raises:
        ValueError: an unknown name, or Triton where it can't run.
    """
    fits = dim >= 32 and dim & (dim - 1) == 0
    if implementation is None:
        return "triton" if device.type == "cuda" and fits else "reference"
    check_choice("attention", implementation, IMPLEMENTATIONS)
    if implementation == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(f"attention=triton needs a GPU, the model is on {device.type}; choose attention=reference")
    if implementation == "triton" and not fits:
        raise ValueError(f"attention=triton takes head_dim 32, 64, 128 or 256, not {dim}; choose attention=reference")
    return implementation


def decode_attention(
    query: Tensor, segments: Sequence[Segment], scaling: float, implementation: str | None = None
) -> Attention:
    """See mikv.kernels.decode_reference.decode_attention. On a CPU a faster implementation runs where nothing else is asked
    for; so does the reference on a GPU for vectors of 32 bits."""
    if implementation is None and query.device.type == "cpu":
        return decode_cpu.decode_attention(query, segments, scaling)
    wide = any(x.data.dtype == torch.float32 for segment in segments for x in (segment.keys, segment.values))
    if wide or picked(query.device, implementation, query.shape[-1]) == "reference":
        return decode_reference.decode_attention(query, segments, scaling)
    from mikv.kernels import decode_launch

    return decode_launch.decode_attention(query, segments, scaling)


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    scaling: float,
    padding: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """See mikv.kernels.columns_reference.column_sums. lse None = it is computed here, at the price of a second pass."""
    if picked(query.device, implementation, query.shape[-1]) == "reference":
        lse = columns_reference.log_sum_exp(query, key, scaling, padding) if lse is None else lse
        return columns_reference.column_sums(query, key, lse, scaling, padding)
    from mikv.kernels import columns_launch

    lse = columns_launch.log_sum_exp(query, key, scaling, padding) if lse is None else lse
    return columns_launch.column_sums(query, key, lse, scaling, padding)


def encode(x: Tensor, bits: int, groups: int, balancer: Tensor | None = None, implementation: str | None = None) -> Vectors:
    """See mikv.kernels.encode_reference.encode."""
    if picked(x.device, implementation) == "reference":
        return encode_reference.encode(x, bits, groups, balancer)
    from mikv.kernels import encode_launch

    return encode_launch.encode(x, bits, groups, balancer)
