"""TOVA, token omission via attention (arXiv 2401.06104): each step drops the token that its query attends to least.

The mean over all query heads of a layer decides, so that its heads hold the same tokens; no sinks and no window by rule.
Deviations from schwartz-lab-NLP/TOVA, src/tova_cache.py: the prompt is cut to size once, by its last query, where the authors
take tokens out one by one as it is read; and the size is a share of the tokens, not a number of them.
"""

from mikv.budget import kept
from mikv.importance.last_query import LastQuery
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier


def tova(keep: float = 0.2, budget: str = "ratio") -> Policy:
    """
    Args:
        keep: share of tokens that stay.
        budget: `ratio` = of the tokens seen so far, or `fixed` = of the prompt.
    """
    return Policy(
        name="tova",
        label=f"tova {percent(keep)}" + describe_options(budget=(budget, "ratio")),
        tiers=(Tier(16), Tier(0)),
        budget=kept("tova", keep, budget),
        importance=LastQuery(),
    )
