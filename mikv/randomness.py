"""Counter-based random numbers: a hash of what a number belongs to, the same on every machine and in any batch.

Imports nothing of the project.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def uniform(counters: Tensor) -> Tensor:
    """float64 in [0, 1) for int64 counters of any shape, by splitmix64's finalizer (int64 arithmetic wraps)."""
    import torch

    x = counters
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor  # the mask makes the shift a logical one
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 11) & (2**53 - 1)).to(torch.float64) / 2**53


def number_of(tokens: Sequence[int]) -> int:
    """A number that stands for a token sequence in counters."""
    return zlib.crc32(array("q", tokens).tobytes())
