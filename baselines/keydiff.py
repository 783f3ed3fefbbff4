"""KeyDiff (arXiv 2504.15364): keep the prompt's tokens whose keys differ most from the mean key.

As kvpress's KeyDiffPress: at once, where the paper goes block by block through prompts that don't fit into the memory.
"""

from mikv.budget import kept
from mikv.importance.keys import KeyDifference
from mikv.policy import Policy, percent
from mikv.quant.tier import Tier


def keydiff(keep: float = 0.2) -> Policy:
    """
    Args:
        keep: share of the prompt's tokens that stay. What comes later stays.
    """
    return Policy(
        name="keydiff",
        label=f"keydiff {percent(keep)}",
        tiers=(Tier(16), Tier(0)),
        budget=kept("keydiff", keep, "fixed"),
        importance=KeyDifference(),
        every=0,
    )
