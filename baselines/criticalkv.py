"""CriticalKV (arXiv 2502.03805): half of the budget by SnapKV's attention, the rest by it times the norm of W_o v.

As kvpress's CriticalKVPress(SnapKVPress()). The size is a share of the prompt.
"""

from mikv.budget import kept
from mikv.importance.pooled import Critical, Pooled
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier
from mikv.shares import check_ratio


def criticalkv(keep: float = 0.2, window: int = 32, kernel: int = 5, first: float = 0.5, epsilon: float = 1e-4) -> Policy:
    """
    Args:
        keep, window, kernel: see baselines.snapkv.snapkv.
        first: part of the budget that attention alone decides about.
        epsilon: is added to the mean attention of a token.
    """
    check_ratio("criticalkv: first", first)
    options = describe_options(window=(window, 32), kernel=(kernel, 5), first=(first, 0.5), epsilon=(epsilon, 1e-4))
    return Policy(
        name="criticalkv",
        label=f"criticalkv {percent(keep)}{options}",
        tiers=(Tier(16), Tier(0)),
        budget=kept("criticalkv", keep, "fixed"),
        importance=Critical(Pooled(window, kernel), keep * first, epsilon),
        window=window,
        every=0,
    )
