"""H2O, the heavy-hitter oracle (arXiv 2306.14048): keep the most recent tokens and those with the most attention.

Half of the budget each; score = accumulated attention, no decay, summed in float32; evicted for good, with its score.
Deviations from FMInference/H2O, none of which makes it weaker: selection per KV head, not per query head (per query head
the cache would grow by the group size); strict budgets (its mask code hides a token for one step when it leaves the
recent window, and may take it back as a heavy hitter); the prompt is compressed before its last token is answered.
"""

from mikv.budget import kept
from mikv.importance.scores import Accumulated
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier, tier_of


def h2o(
    keep: float = 0.2,
    tier: Tier | str | int = 16,
    recent: float = 0.5,
    budget: str = "ratio",
    positions: str = "original",
) -> Policy:
    """
    Args:
        keep: share of tokens that stay.
        tier: bits of those that stay.
        recent: part of the budget that holds the most recent tokens.
        budget, positions: see mikv.mikv.mikv and `Policy`.
    """
    tier = tier_of(tier)
    label = f"h2o {percent(keep)}" + ("" if tier == Tier(16) else f" {tier.label}")
    label += describe_options(recent=(recent, 0.5), budget=(budget, "ratio"), positions=(positions, "original"))
    return Policy(
        name="h2o",
        label=label,
        tiers=(tier, Tier(0)),
        budget=kept("h2o", keep, budget),
        importance=Accumulated(),
        recent=recent,
        positions=positions,
    )
