"""More bits for the keys of some heads: of those in which a code's noise would disturb the attention most.

    a key's code has the relative error e = E|y^ - y|^2 / E|y|^2, about 4^-bits
    noise of a logit         e s,    s = (sum_c E q_c^2 / b_c^2) (sum_c E (b_c u_c)^2) / D^2      (white after the rotation)
    weight of a head         w = s m,    m = the part of the last queries' attention that coded tokens receive

Noise that falls on tokens which nobody attends does no harm, hence m. The bits go where they take most of the summed noise
away, sum w 4^-bits (reverse water-filling), settled at the prompt and read from it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.budget import ALL, Amounts, Budget
from mikv.importance.base import Context, Observer
from mikv.importance.scores import ColumnSums

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeadBits(Budget):
    """Which of the last tiers takes in what leaves the tiers above: one for each layer and head.

    Args:
        above: budget of the tiers above, in numbers of tokens; shares are of the prompt.
        bits: bits of a key in each of the last tiers, falling.
        extra: bits of a key above the last tier's, mean over all layers and heads.
        last: queries that say where attention goes.
    """

    above: Amounts
    bits: tuple[int, ...]
    extra: float
    last: int = 64

    grows = False

    def __post_init__(self) -> None:
        if len(self.bits) < 2 or list(self.bits) != list(range(self.bits[0], self.bits[-1] - 1, -1)):
            raise ValueError(f"bits={self.bits}: of two tiers at least, each one less than the one before")
        if not 0 <= self.extra <= self.bits[0] - self.bits[-1]:
            raise ValueError(f"extra={self.extra}: bits of keys, between 0 and {self.bits[0] - self.bits[-1]}")
        object.__setattr__(self, "extra", float(self.extra))

    @property
    def tiers(self) -> int:
        return self.above.tiers + len(self.bits) - 1

    @property
    def observer(self) -> Observer:
        return ColumnSums(last=self.last)

    @property
    def whole(self) -> int:
        return len(self.bits)

    def room(self, tier: int) -> int:
        return self.above.room(tier)

    def only(self, tier: int) -> int | None:
        return self.above.only(tier)

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        import torch

        assert context.everywhere is not None
        weight = torch.cat([self._weight(part) for part in context.everywhere()])
        bits = self._filled(weight)[context.layers.cpu()]
        above = self.above.quotas(scores, context).expand(-1, *bits.shape)
        full = above[-1] if len(above) else torch.zeros_like(bits)
        own = [full + ALL * (bits >= least) for least in self.bits[:-1]]
        return torch.cat((above, torch.stack(own)))

    @staticmethod
    def _weight(context: Context) -> Tensor:
        """w, float32 [L, B, H] on the CPU."""
        assert context.observed is not None
        assert context.key_noise is not None
        received = context.observed.masked_fill(context.positions < 0, 0)
        coded = received.masked_fill(context.protected, 0).sum(dim=-1) / received.sum(dim=-1).clamp(min=1e-9)
        return (context.key_noise() * coded).cpu()

    def _filled(self, weight: Tensor) -> Tensor:
        """Bits of each layer and head, int64 [L, B, H], from its weight: each next bit where it takes most noise away."""
        import torch

        from mikv.tensors import ranks

        steps = range(self.bits[-1], self.bits[0])  # from so many bits to one more
        gain = torch.stack([weight.double() * (4.0**-bits - 4.0 ** -(bits + 1)) for bits in steps], dim=1)  # [L, J, B, H]
        flat = gain.permute(2, 1, 0, 3).flatten(1)  # lower bits last among equals: they come first
        most = round(self.extra * weight.shape[0] * weight.shape[2])
        taken = (ranks(flat.flip(-1)).flip(-1) < most).view(gain.shape[2], gain.shape[1], gain.shape[0], gain.shape[3])
        return self.bits[-1] + taken.sum(dim=1).permute(1, 0, 2)
