"""Subtract what all keys (or values) of a head have in common.

    after:   mu = mean_i x_i               stored x_i - mu               logits: + q . mu, the same for every token
    before:  mu = mean_i R_-i k_i          stored k_i - R_i mu           logits: + (R_-i q) . mu       R_i = RoPE at position i

Some models add large biases to their keys (Qwen2.5): a few channels hold almost constant values, which eat the range of any
scale per token. The softmax does not feel a shift of all logits, but it must be added back here: tokens of other tiers do not
have it. A mean that is taken after RoPE ages, because middle frequencies turn within a few thousand positions; before RoPE it
is stationary. The first tokens must not count (and must stay exact): their keys are small, less mu they are large, and they
anchor the attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mikv.options import check_choice
from mikv.quant.base import Queries, Sample, Side, Transform, Where

if TYPE_CHECKING:
    from torch import Tensor

    from mikv.rope import Rope

_LIMIT = 65504.0  # of FP16, in which the mean is stored


@dataclass(frozen=True)
class Centre(Transform):
    """Subtract the mean. rope: where the mean of keys is taken, `before` or `after` RoPE; values have `after` alone."""

    rope: str = "before"

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_choice("centre: rope", self.rope, ("before", "after"))

    @property
    def keys_only(self) -> bool:
        return self.rope == "before"

    @property
    def needs_positions(self) -> bool:
        return self.rope == "before"

    def fit(self, sample: Sample) -> Side:
        """{"mean": FP16 [L, B, H, D]}; zero where no token counts."""
        real = sample.real[None, :, None, :, None]
        x = sample.x
        if self.rope == "before":
            positions = sample.positions.clamp(min=0)[None, :, None].expand(x.shape[:4])
            x = _rope(sample.rope).turn_back(x, positions, x.shape[3])
        mean = x.masked_fill(~real, 0).sum(dim=3) / real.sum(dim=3).clamp(min=1)
        return {"mean": mean.clamp(-_LIMIT, _LIMIT).half()}

    def apply(self, x: Tensor, side: Side, where: Where) -> Tensor:
        return x - self._mean(x, side, where)

    def undo(self, y: Tensor, side: Side, where: Where) -> Tensor:
        return y + self._mean(y, side, where)

    def _mean(self, x: Tensor, side: Side, where: Where) -> Tensor:
        mean = side["mean"].float().unsqueeze(3)
        if self.rope == "after":
            return mean
        assert where.positions is not None
        places = where.positions.clamp(min=0)
        return _rope(where.rope).turn(mean.expand(x.shape), places, int(places.amax()) if places.numel() else 0)

    def query(self, q: Tensor, side: Side) -> Tensor:
        return q

    def shift(self, q: Tensor, side: Side, where: Where) -> Tensor | None:
        mean = side["mean"].float().unsqueeze(3)  # [L, B, H, 1, D]
        if self.rope == "before":
            assert where.positions is not None
            shape = (*where.positions.shape, mean.shape[-1])
            mean = self._mean(mean.expand(shape), side, where)
        return q @ mean.transpose(-1, -2)

    def output(self, o: Tensor, weight: Tensor, side: Side) -> Tensor:
        return o + weight * side["mean"].float().unsqueeze(3)

    def after(self, queries: Queries, side: Side) -> Queries | None:
        return queries


def _rope(rope: Rope | None) -> Rope:
    if rope is None:
        raise ValueError(
            "this model's RoPE frequencies depend on the length: keys can't be centred before it; use centre/after"
        )
    return rope
