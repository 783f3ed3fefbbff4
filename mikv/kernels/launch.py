"""What every launch needs to know of Triton and of the machine."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (set before triton is imported; the tests do)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def compiler_options() -> dict[str, Any]:
    """Multiplications and additions are fused, said aloud: the default changes with Triton 3.10."""
    return {} if interpreted() else {"enable_fp_fusion": True}


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 of a CPU, where kernels are interpreted program by program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
