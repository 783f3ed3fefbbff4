"""SnapKV (arXiv 2404.14469): the prompt's last queries say which of its tokens stay; with them their neighbours.

Their attention is averaged over the window's queries and over neighbours (kernel); the window itself stays. Deviations from
FasterDecoding/SnapKV, snapkv/monkeypatch/snapkv_utils.py, none of which makes it weaker: selection per KV head, not per query
head (there the cache grows by the group size); the size is a share of the prompt, not a number of tokens. kvpress's SnapKVPress
is the same with window=64.
"""

from mikv.budget import kept
from mikv.importance.pooled import Pooled
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier


def snapkv(keep: float = 0.2, window: int = 32, kernel: int = 5) -> Policy:
    """
    Args:
        keep: share of the prompt's tokens that stay, the window's among them. What comes later stays.
        window: last queries that are asked; their tokens stay.
        kernel: neighbours and the token itself, over which attention is averaged; odd.
    """
    return Policy(
        name="snapkv",
        label=f"snapkv {percent(keep)}" + describe_options(window=(window, 32), kernel=(kernel, 5)),
        tiers=(Tier(16), Tier(0)),
        budget=kept("snapkv", keep, "fixed"),
        importance=Pooled(window, kernel),
        window=window,
        every=0,
    )
