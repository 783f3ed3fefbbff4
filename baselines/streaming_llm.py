"""StreamingLLM (arXiv 2309.17453): keep the first tokens, the attention sinks, and a window of the most recent ones.

The published form re-indexes positions inside the cache (`positions=contiguous`, the default here): the query is as far
from the sinks as if nothing had been evicted in between. `positions=original` keeps every token's own position.
Deviation: the window is cut after an exact prefill, as other harnesses do; the original slides during prefill too.
"""

from mikv.budget import kept
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier


def streaming_llm(keep: float = 0.2, sinks: int = 4, budget: str = "ratio", positions: str = "contiguous") -> Policy:
    """
    Args:
        keep: share of tokens that stay, sinks included.
        sinks: how many first tokens stay.
        budget, positions: see mikv.mikv.mikv and `Policy`.
    """
    label = f"streaming_llm {percent(keep)}"
    label += describe_options(sinks=(sinks, 4), budget=(budget, "ratio"), positions=(positions, "contiguous"))
    return Policy(
        name="streaming_llm",
        label=label,
        tiers=(Tier(16), Tier(0)),
        budget=kept("streaming_llm", keep, budget),
        sinks=sinks,
        positions=positions,
    )
