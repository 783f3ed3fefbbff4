"""PyramidKV (arXiv 2406.02069) with AdaKV's heads (2407.11550): lower layers keep more, a layer's heads share its budget."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mikv.budget import AcrossHeads, Amounts, Budget
from mikv.importance.base import Context
from mikv.importance.scores import Accumulated
from mikv.policy import Policy, percent
from mikv.quant.tier import Tier


@dataclass(frozen=True)
class Pyramid(Budget):
    """From (1 + slope) times the mean budget in the first layer down to (1 - slope) times in the last."""

    mean: Amounts
    slope: float
    tiers = 2
    grows = False

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        place = context.layers.cpu().double() / max(1, context.total_layers - 1)
        factors = 1 + self.slope * (1 - 2 * place)
        return (self.mean.quotas(scores, context) * factors[None, :, None, None]).floor().long()


def pyramid(keep: float = 0.4, slope: float = 0.5, least: float = 0.2) -> Policy:
    """keep: share of the prompt, mean over layers; slope, see Pyramid; least: part of its budget that every head keeps."""
    return Policy(
        name="pyramid",
        label=f"pyramid {percent(keep)}",
        tiers=(Tier(16), Tier(0)),
        budget=AcrossHeads(Pyramid(Amounts((keep,), of="prompt"), slope), least),
        importance=Accumulated(),
        window=2,
    )
