"""Affine codes per channel over a block of tokens (KIVI's keys, arXiv 2402.02750): eq. 1 of the paper, turned by a quarter.

Keys have outliers in a few channels, whatever the token; a scale per channel gives each its own step. The tokens of a block
share it, so they must come together, and stay together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mikv.quant.base import Code, Parts
from mikv.quant.codes.affine import check_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Channel(Code):
    """
    Args:
        bits: 1, 2, 3, 4, 5 or 8.
        block: tokens that share a scale and a minimum per channel.
    """

    bits: int
    block: int = 32

    per_block: ClassVar[frozenset[str]] = frozenset(("scale", "zero"))

    def __post_init__(self) -> None:
        check_bits("channel", self.bits)
        if self.block < 2:
            raise ValueError(f"channel{self.bits}: block={self.block}; at least 2 tokens share a scale")

    def encode(self, y: Tensor, storage: torch.dtype) -> Parts:
        """{"codes": [..., S, *], "scale", "zero": FP16 [..., S / block, D]}"""
        from mikv.quant.affine import quantize
        from mikv.quant.packing import pack

        tokens, dim = y.shape[-2:]
        turned = y.unflatten(-2, (-1, self.block)).transpose(-1, -2)  # [..., S / block, D, block]
        codes, scale, zero = quantize(turned, self.bits, self.block)
        codes = codes.transpose(-1, -2).reshape(*y.shape[:-2], tokens, dim)
        return {"codes": pack(codes, self.bits), "scale": scale.squeeze(-1), "zero": zero.squeeze(-1)}

    def decode(self, parts: Parts) -> Tensor:
        import torch

        from mikv.quant.affine import Quantized, dequantize
        from mikv.quant.packing import unpack, unpacked_dim

        codes = unpack(parts["codes"], self.bits, unpacked_dim(parts["codes"], self.bits), torch.float32)
        turned = codes.unflatten(-2, (-1, self.block)).transpose(-1, -2).contiguous()
        x = dequantize(Quantized(turned, parts["scale"].unsqueeze(-1), parts["zero"].unsqueeze(-1)))
        return x.transpose(-1, -2).reshape(codes.shape)

    def size(self, head_dim: int) -> float:
        return self.bits + 32 / self.block
