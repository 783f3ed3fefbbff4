"""Uniform quantization (round-to-nearest): every pair at the same bits.

The paper's RTN baseline: the same quantizer and group as MiKV (which it equals at keep = 0). With `balance` it also has
MiKV's channel balancer, and is then the rival that must be beaten at equal bytes.
"""

from mikv.policy import Policy, describe_options
from mikv.quant.tier import Tier, tier_of


def uniform(tier: Tier | str | int = 4, balance: bool = False) -> Policy:
    """
    Args:
        tier: how every pair is stored, see mikv/quant/tier.py.
        balance: MiKV's outlier-aware channel balancer for keys that are quantized by bits alone.
    """
    tier = tier_of(tier)
    label = f"uniform {tier.label}" + (" balanced" if balance else "") + describe_options(group=(tier.group, None))
    return Policy(name="uniform", label=label, tiers=(tier.balanced() if balance else tier,))
