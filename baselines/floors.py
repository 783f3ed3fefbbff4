"""Floor lines: mixed precision with the importance taken out. What MiKV gains over them is what importance is worth."""

from mikv.budget import kept
from mikv.importance.base import Importance
from mikv.importance.scores import Noise
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier, tier_of


def random(
    keep: float = 0.2,
    high: Tier | str | int = 16,
    low: Tier | str | int = 2,
    balance: bool = True,
    recent: float = 0.5,
    budget: str = "ratio",
    seed: int = 0,
) -> Policy:
    """MiKV with a random score: which tokens are important is drawn at random (the recent part of the budget stays).

    Args: see mikv.mikv.mikv; seed: of the draw. `low.bits=0` makes it an eviction policy.
    """
    return _floor("random", Noise(seed), keep, high, low, balance, recent, budget)


def recent_only(
    keep: float = 0.2,
    high: Tier | str | int = 16,
    low: Tier | str | int = 2,
    balance: bool = True,
    budget: str = "ratio",
) -> Policy:
    """MiKV with recency for importance: the whole budget holds the most recent tokens.

    Args: see mikv.mikv.mikv. `low.bits=0` makes it a sliding window.
    """
    return _floor("recent_only", None, keep, high, low, balance, 0.0, budget)


def _floor(
    name: str,
    importance: Importance | None,
    keep: float,
    high: Tier | str | int,
    low: Tier | str | int,
    balance: bool,
    recent: float,
    budget: str,
) -> Policy:
    high, low = tier_of(high), tier_of(low)
    label = f"{name} {percent(keep)} {high.label}/{low.label}" + ("" if balance else " no balancer")
    label += describe_options(
        recent=(recent, 0.0 if name == "recent_only" else 0.5),
        budget=(budget, "ratio"),
        seed=(getattr(importance, "seed", 0), 0),
    )
    return Policy(
        name=name,
        label=label,
        tiers=(high.balanced(), low.balanced()) if balance else (high, low),
        budget=kept(name, keep, budget),
        importance=importance,
        recent=recent,
    )
