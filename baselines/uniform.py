"""Uniform quantization (round-to-nearest): every pair at the same bits, whoever it is.

The paper's RTN baseline: the same quantizer and group as MiKV (which it equals at keep = 0). With `balance` it also has
MiKV's channel balancer, and is then the rival that must be beaten at equal bytes.
"""

from mikv.policy import Policy, describe_options
from mikv.types import Tier


def uniform(tier: Tier = Tier(4), balance: bool = False) -> Policy:
    """
    Args:
        tier: bits of every pair.
        balance: MiKV's outlier-aware channel balancer for keys.
    """
    label = f"uniform {tier}" + (" balanced" if balance else "") + describe_options(group=(tier.group, None))
    return Policy(name="uniform", label=label, tiers=(tier,), balance=balance)
