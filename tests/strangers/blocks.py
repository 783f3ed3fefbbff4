"""KIVI (arXiv 2402.02750): keys per channel over blocks of tokens, values per token; what fills no block is exact."""

from __future__ import annotations

from mikv.budget import Amounts
from mikv.policy import Policy
from mikv.quant.tier import Tier


def blocks(bits: int = 2, window: int = 32) -> Policy:
    """bits: of keys and values; window: tokens of a block, which is flushed when it is full."""
    coded = Tier(key=f"channel{bits}/{window}", value=f"affine{bits}")
    return Policy(name="blocks", label=f"blocks {bits}", tiers=(Tier(16), coded), budget=Amounts((0.0,)))
