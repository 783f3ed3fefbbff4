"""DefensiveKV (arXiv 2510.13334): keep what any late query may want, weighted by its value; heads share their layer's budget.

As FFY0/DefensiveKV, kvpress/presses/efficient_defensivekv_press.py: one row at a time there, here each prompt of a batch for
itself; its step of 0.9 takes the attention to the last tokens *before* the window off where the window's is meant, and so does
this. Its Layer-DefensiveKV, whose layers share too, is left out.
"""

from mikv.budget import AcrossHeads, kept
from mikv.importance.worst import WorstCase
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier


def defensivekv(keep: float = 0.2, window: int = 32, kernel: int = 5, mass: float = 0.9) -> Policy:
    """
    Args:
        keep: share of the prompt's tokens that stay, mean over heads, the window's among them. What comes later stays.
        window, kernel: see baselines.snapkv.snapkv.
        mass: the tokens that make up so much of the mean attention come first.
    """
    return Policy(
        name="defensivekv",
        label=f"defensivekv {percent(keep)}" + describe_options(window=(window, 32), kernel=(kernel, 5), mass=(mass, 0.9)),
        tiers=(Tier(16), Tier(0)),
        budget=AcrossHeads(kept("defensivekv", keep, "fixed"), 0.0),
        importance=WorstCase(window, kernel, keep, mass),
        window=window,
        every=0,
    )
