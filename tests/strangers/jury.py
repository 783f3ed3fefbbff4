"""SnapKV (arXiv 2404.14469): the attention of the prompt's last queries, pooled over neighbours, says which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mikv.budget import Amounts
from mikv.importance.base import Context, Observer
from mikv.importance.scores import ColumnSums
from mikv.policy import Policy, percent
from mikv.quant.tier import Tier


@dataclass(frozen=True)
class Voted:
    """Sums of the last `window` queries' attention, the maximum over `kernel` neighbours."""

    window: int
    kernel: int

    @property
    def observer(self) -> Observer:
        return ColumnSums(last=self.window)

    def score(self, context: Context) -> Tensor:
        if context.observed is None or not context.observed.numel():
            return torch.zeros(context.positions.shape, device=context.positions.device)
        flat = context.observed.flatten(0, 2)[:, None]
        pooled = torch.nn.functional.max_pool1d(flat, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled[:, 0].view(context.observed.shape)

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        return scores


def jury(keep: float = 0.3, window: int = 4, kernel: int = 3) -> Policy:
    """keep: share of the prompt; window: last queries, whose own tokens stay; kernel: odd."""
    return Policy(
        name="jury",
        label=f"jury {percent(keep)}",
        tiers=(Tier(16), Tier(0)),
        budget=Amounts((keep,), of="prompt"),
        importance=Voted(window, kernel),
        window=window,
        every=0,
    )
