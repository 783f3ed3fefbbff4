"""The kernels' public functions: torch references on the CPU, Triton on a GPU, or whichever is asked for.

`implementation` is None (by the device of the query), `reference` or `triton`. Signatures and results are the references'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mikv.kernels import reference
from mikv.kernels.launch import interpreted
from mikv.kernels.segments import Attention, Segment

IMPLEMENTATIONS = ("reference", "triton")


def picked(device: torch.device, implementation: str | None = None) -> str:
    """Which implementation runs on a device.

    Raises:
        ValueError: an unknown name, or Triton on a device that it can't run on.
    """
    if implementation is None:
        return "triton" if device.type == "cuda" else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation}: choose {' or '.join(IMPLEMENTATIONS)}")
    if implementation == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(f"attention=triton needs a GPU, the model is on {device.type}; choose attention=reference")
    return implementation


def decode_attention(
    query: Tensor, segments: Sequence[Segment], scaling: float, implementation: str | None = None
) -> Attention:
    """See mikv.kernels.reference.decode_attention."""
    if picked(query.device, implementation) == "reference":
        return reference.decode_attention(query, segments, scaling)
    from mikv.kernels import decode_launch

    return decode_launch.decode_attention(query, segments, scaling)
