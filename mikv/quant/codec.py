"""From exact vectors to the tensors that are stored, and back: quantizer and packing behind one pair of methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mikv.quant.affine import Quantized, dequantize, quantize
from mikv.quant.packing import pack, unpack

Parts = dict[str, Tensor]  # by name of the part; each [..., something per token]


def storage_dtype(compute: torch.dtype) -> torch.dtype:
    """dtype of the 16-bit tier: the model's own if it has 16 bits, else FP16 (a float32 model stores 16 bits too)."""
    return compute if compute in (torch.float16, torch.bfloat16) else torch.float16


@dataclass(frozen=True)
class Codec:
    """Stores vectors of `head_dim` channels at `bits` bits (16 = as they are, in `dtype`)."""

    bits: int
    group: int
    head_dim: int
    dtype: torch.dtype

    def encode(self, x: Tensor) -> Parts:
        """x [..., D] -> {"raw"} at 16 bits, else {"codes", "scale", "zero"}."""
        if self.bits == 16:
            limit = torch.finfo(self.dtype).max  # saturate, as the quantizer does: an infinite key makes every logit NaN
            return {"raw": x.to(self.dtype, copy=True).clamp_(-limit, limit)}
        codes, scale, zero = quantize(x, self.bits, self.group)
        return {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, parts: Parts) -> Tensor:
        """float32 [..., D]."""
        if self.bits == 16:
            return parts["raw"].to(torch.float32)
        codes = unpack(parts["codes"], self.bits, self.head_dim, torch.float32)
        return dequantize(Quantized(codes, parts["scale"], parts["zero"]))
