"""Knorm (arXiv 2406.11430): keep the prompt's tokens whose keys have the smallest norm.

As kvpress's KnormPress: at the prompt only, after RoPE, per KV head, no window and no sinks. The authors' code
(alessiodevoto/l2compress) skips the first two layers; here, as in kvpress, none is.
"""

from mikv.budget import kept
from mikv.importance.keys import KeyNorm
from mikv.policy import Policy, percent
from mikv.quant.tier import Tier


def knorm(keep: float = 0.2) -> Policy:
    """
    Args:
        keep: share of the prompt's tokens that stay. What comes later stays.
    """
    return Policy(
        name="knorm",
        label=f"knorm {percent(keep)}",
        tiers=(Tier(16), Tier(0)),
        budget=kept("knorm", keep, "fixed"),
        importance=KeyNorm(),
        every=0,
    )
