"""Scale each channel by what the prompt showed of it (ZipCache, arXiv 2405.14256).

range:  y = (x - min_t x) / (max_t x - min_t x)     all of the prompt lies in 0..1, for codes with a fixed grid (unit)
root:   y = x / sqrt(max_t |x|)                     loud channels widen a token's range less
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mikv.options import check_choice
from mikv.quant.base import Sample, Side, Transform, Where

if TYPE_CHECKING:
    from torch import Tensor

_LIMIT = 65504.0  # of FP16, in which all is stored
_LEAST = 2.0**-24  # a channel that is constant must not divide by zero


@dataclass(frozen=True)
class Scale(Transform):
    """by: range or root, see above."""

    by: str = "range"

    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_choice("scale: by", self.by, ("range", "root"))

    def fit(self, sample: Sample) -> Side:
        """{"low", "span"} or {"root"}: FP16 [L, B, H, D]; nothing is scaled where no token counts."""
        import torch

        real = sample.real[None, :, None, :, None]
        none = ~real.any(dim=3)
        if self.by == "root":
            root = sample.x.abs().masked_fill(~real, 0).amax(dim=3).sqrt()
            return {"root": root.masked_fill(root == 0, 1).clamp(_LEAST, _LIMIT).half()}
        low, high = (
            f(sample.x.masked_fill(~real, of_padding), dim=3).masked_fill(none, nothing).clamp(-_LIMIT, _LIMIT)
            for f, of_padding, nothing in ((torch.amin, torch.inf, 0.0), (torch.amax, -torch.inf, 1.0))
        )
        low = low.half()
        return {"low": low, "span": (high - low.float()).clamp(_LEAST, _LIMIT).half()}

    def apply(self, x: Tensor, side: Side, where: Where) -> Tensor:
        low, span = _parts(side)
        return x / span if low is None else (x - low) / span

    def undo(self, y: Tensor, side: Side, where: Where) -> Tensor:
        low, span = _parts(side)
        return y * span if low is None else y * span + low

    def query(self, q: Tensor, side: Side) -> Tensor:
        return q * _parts(side)[1]

    def shift(self, q: Tensor, side: Side, where: Where) -> Tensor | None:
        low, _ = _parts(side)
        return None if low is None else q @ low.transpose(-1, -2)

    def output(self, o: Tensor, weight: Tensor, side: Side) -> Tensor:
        low, span = _parts(side)
        return o * span if low is None else o * span + weight * low


def _parts(side: Side) -> tuple[Tensor | None, Tensor]:
    """What is subtracted, and what is divided by, float32 [L, B, H, 1, D]."""
    if "root" in side:
        return None, side["root"].float().unsqueeze(3)
    return side["low"].float().unsqueeze(3), side["span"].float().unsqueeze(3)
