"""16 bits: vectors as they are, in the model's own 16-bit type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.quant.base import Code, Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Exact(Code):
    """FP16 or BF16."""

    bits = 16

    def encode(self, y: Tensor, storage: torch.dtype) -> Parts:
        """{"raw": [..., S, D]}"""
        import torch

        limit = torch.finfo(storage).max  # saturate, as the quantizers do: an infinite key makes every logit NaN
        return {"raw": y.to(storage, copy=True).clamp_(-limit, limit)}

    def decode(self, parts: Parts) -> Tensor:
        return parts["raw"].float()

    def size(self, head_dim: int) -> float:
        return 16.0
