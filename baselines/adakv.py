"""AdaKV (arXiv 2407.11550): SnapKV's scores, ranked across the heads of a layer: heads with much to keep keep more.

Each head first has its best `least` of the budget, the rest goes to the highest scores of all heads together. Deviations: the
authors (FFY0/AdaKV, adaptive_snapkv/monkeypatch/snapkv_utils.py) pool by the maximum over 7 neighbours and score query
heads; here, as in kvpress's AdaKVPress, it is SnapKV's mean over 5, per KV head. kvpress masks what it evicts and holds the
full cache; here heads store as many tokens as they keep, and these are counted.
"""

from mikv.budget import AcrossHeads, kept
from mikv.importance.pooled import Pooled
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier


def adakv(keep: float = 0.2, window: int = 32, kernel: int = 5, least: float = 0.2) -> Policy:
    """
    Args:
        keep, window, kernel: see baselines.snapkv.snapkv; `keep` is the mean over heads.
        least: part of its budget that every head keeps.
    """
    return Policy(
        name="adakv",
        label=f"adakv {percent(keep)}" + describe_options(window=(window, 32), kernel=(kernel, 5), least=(least, 0.2)),
        tiers=(Tier(16), Tier(0)),
        budget=AcrossHeads(kept("adakv", keep, "fixed"), least),
        importance=Pooled(window, kernel),
        window=window,
        every=0,
    )
