"""Full cache: every pair at 16 bits. The baseline that every other policy is compared with."""

from mikv.policy import Policy
from mikv.quant.tier import Tier


def full() -> Policy:
    """No parameters."""
    return Policy(name="full", label="full", tiers=(Tier(16),))
