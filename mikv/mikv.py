"""MiKV: mixed-precision KV cache by token importance (arXiv 2402.18096). The method in one sitting:

1. *Prefill* with exact attention; note how much attention each token received (H2O's accumulated score), and the
   largest |query| and |key| of each channel.
2. *Tiers.* The `keep` share of tokens is important: half of them the most recent, half those with the highest scores.
   They stay at `high` bits. All others, which H2O would evict, are kept at `low` bits.
3. *Balancer.* Before a key is quantized, its channels are scaled by b = sqrt(max|q| / max|k|), so that the channels in
   which both have outliers do not spoil the quantizer's step (mikv/quant/transforms/balance.py).
4. *Decoding.* A new token enters at `high`. After each step's attention, scores grow by what it gave, and where the
   budget is exceeded the least important token is demoted to `low`, for good. Nothing is ever evicted.

The code that does it: scores in mikv/importance/scores.py, budgets in mikv/budget.py, ranking and
assignment in mikv/assignment.py, storage in mikv/cache/policy_store.py.
"""

from __future__ import annotations

from mikv.budget import kept
from mikv.importance.scores import Accumulated
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier, tier_of


def mikv(
    keep: float = 0.2,
    high: Tier | str | int = 16,
    low: Tier | str | int = 2,
    balance: bool = True,
    recent: float = 0.5,
    budget: str = "ratio",
) -> Policy:
    """The paper's policy; its defaults are the paper's headline setting (20 % in FP16, the rest INT2, balancer on).

    Args:
        keep: share of tokens in the importance cache.
        high, low: tiers of important tokens and of all others, see mikv/quant/tier.py.
        balance: outlier-aware channel balancer for keys that are quantized by bits alone.
        recent: part of the importance cache that holds the most recent tokens (H2O's equal split; the paper is silent).
        budget: `ratio` = shares of the tokens seen so far, or `fixed` = of the prompt.
    """
    high, low = tier_of(high), tier_of(low)
    label = f"mikv {percent(keep)} {high.label}/{low.label}"
    label += "" if balance else " no balancer"
    label += describe_options(
        recent=(recent, 0.5), budget=(budget, "ratio"), high_group=(high.group, None), low_group=(low.group, None)
    )
    return Policy(
        name="mikv",
        label=label,
        tiers=(high.balanced(), low.balanced()) if balance else (high, low),
        budget=kept("mikv", keep, budget),
        importance=Accumulated(),
        recent=recent,
    )
