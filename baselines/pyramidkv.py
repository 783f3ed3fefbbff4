"""PyramidKV (arXiv 2406.02069): SnapKV's scores; lower layers keep more tokens, higher ones fewer.

From the first layer to the last the budget falls linearly, from `most` to `fewest` tokens, the mean being that of SnapKV:
fewest = mean / beta, most = 2 mean - fewest. Where that is more than a prompt without its window has, `most` is that, and
`fewest` makes up for it; where fewer than a window would be left, all layers have the mean (kvpress's rules; the authors' code
is in Zefan-Cai/KVCache-Factory, pyramidkv/pyramidkv_utils.py, whose budgets are numbers of tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.budget import Budget
from mikv.importance.base import Context
from mikv.importance.pooled import Pooled
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier
from mikv.shares import check_ratio, exact

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pyramid(Budget):
    """keep: share of the prompt, mean over layers; window: tokens that each layer keeps; beta: how steep."""

    keep: float
    window: int
    beta: int

    tiers = 2
    grows = False

    def __post_init__(self) -> None:
        check_ratio("pyramidkv", self.keep)
        object.__setattr__(self, "keep", float(self.keep))
        if isinstance(self.beta, bool) or not isinstance(self.beta, int) or self.beta < 1:
            raise ValueError(f"pyramidkv: beta={self.beta}: a whole number, 1 = all layers alike")

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        import torch

        of_layers = [
            [self._tokens(layer, length, context.total_layers) for length in context.prompt_lengths.tolist()]
            for layer in context.layers.tolist()
        ]
        return torch.tensor(of_layers)[None, :, :, None]

    def _tokens(self, layer: int, length: int, layers: int) -> int:
        mean = float(exact(self.keep) * length)
        fewest = mean / self.beta
        most = 2 * mean - fewest
        if most >= length - self.window:
            most = length - self.window
            fewest = 2 * mean - most
        if not length >= most >= fewest >= self.window or layers == 1:
            return round(mean)
        return round(most - layer * (most - fewest) / (layers - 1))


def pyramidkv(keep: float = 0.2, window: int = 32, kernel: int = 5, beta: int = 20) -> Policy:
    """
    Args:
        keep, window, kernel: see baselines.snapkv.snapkv; `keep` is the mean over layers.
        beta: the last layer keeps 1 / beta of the mean.
    """
    return Policy(
        name="pyramidkv",
        label=f"pyramidkv {percent(keep)}" + describe_options(window=(window, 32), kernel=(kernel, 5), beta=(beta, 20)),
        tiers=(Tier(16), Tier(0)),
        budget=Pyramid(keep, window, beta),
        importance=Pooled(window, kernel),
        window=window,
        every=0,
    )
