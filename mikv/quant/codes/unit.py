"""An even grid on 0..1, the same for every number: what scales a channel's range into it has been paid for once (scale/range).

code = round(y (2^b - 1)), clipped      y^ = code / (2^b - 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.quant.base import Code, Parts
from mikv.quant.codes.affine import check_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Unit(Code):
    """bits: 1, 2, 3, 4, 5 or 8."""

    bits: int

    def __post_init__(self) -> None:
        check_bits("unit", self.bits)

    def encode(self, y: Tensor, storage: torch.dtype) -> Parts:
        """{"codes": [..., *]}"""
        import torch

        from mikv.quant.packing import pack

        levels = 2**self.bits - 1
        return {"codes": pack((y.float() * levels).round_().clamp_(0, levels).to(torch.uint8), self.bits)}

    def decode(self, parts: Parts) -> Tensor:
        import torch

        from mikv.quant.packing import unpack, unpacked_dim

        codes = unpack(parts["codes"], self.bits, unpacked_dim(parts["codes"], self.bits), torch.float32)
        return codes.div_(2**self.bits - 1)

    def size(self, head_dim: int) -> float:
        return self.bits
