"""The paper's quantizer (eq. 1) per token: codes, and an FP16 scale and minimum for each group of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.quant.base import Code, Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Affine(Code):
    """
    Args:
        bits: 1, 2, 3, 4, 5 or 8.
        group: channels that share a scale and a minimum; None = head_dim / 2, the paper's choice (a half never mixes the two
            halves that RoPE rotates into each other); `all`, or more channels than there are = one scale per vector.
    """

    bits: int
    group: int | str | None = None

    def __post_init__(self) -> None:
        check_bits("affine", self.bits)
        if isinstance(self.group, str) and self.group != "all":
            raise ValueError(f"group={self.group}: channels per scale, or `all`")
        if isinstance(self.group, int) and self.group < 1:
            raise ValueError(f"group={self.group}: channels per scale, at least 1")

    def check(self, head_dim: int) -> None:
        self.groups(head_dim)

    def groups(self, head_dim: int) -> int:
        """Scales of a vector."""
        if isinstance(self.group, str):
            return 1
        group = head_dim // 2 if self.group is None else min(self.group, head_dim)
        if head_dim % group:
            raise ValueError(f"group={group} does not divide head_dim={head_dim}: some channels would have no scale")
        return head_dim // group

    def encode(self, y: Tensor, storage: torch.dtype) -> Parts:
        """{"codes", "scale", "zero"}, see mikv/quant/affine.py and mikv/quant/packing.py."""
        from mikv.quant.affine import quantize
        from mikv.quant.packing import pack

        codes, scale, zero = quantize(y, self.bits, y.shape[-1] // self.groups(y.shape[-1]))
        return {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, parts: Parts) -> Tensor:
        import torch

        from mikv.quant.affine import Quantized, dequantize
        from mikv.quant.packing import unpack, unpacked_dim

        codes = unpack(parts["codes"], self.bits, unpacked_dim(parts["codes"], self.bits), torch.float32)
        return dequantize(Quantized(codes, parts["scale"], parts["zero"]))

    def size(self, head_dim: int) -> float:
        return self.bits + 32 * self.groups(head_dim) / head_dim


def check_bits(name: str, bits: int, choices: tuple[int, ...] = (8, 5, 4, 3, 2, 1)) -> None:
    """Refuse bits that a code does not have."""
    if bits not in choices:
        raise ValueError(f"{name}{bits}: {name} codes have {', '.join(map(str, choices))} bits")
