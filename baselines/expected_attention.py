"""Expected Attention (arXiv 2510.00636): keep the tokens that queries like the prompt's would attend to, at later positions.

As kvpress's ExpectedAttentionPress: sinks stay, what is expected is weighted by the norm of the value. kvpress's leaderboard
runs it with epsilon=0.01 inside AdaKV; `heads: layer` shares a layer's budget between heads as AdaKV does.
"""

from mikv.budget import AcrossHeads, Budget, kept
from mikv.importance.expected import Expected
from mikv.options import check_choice
from mikv.policy import Policy, describe_options, percent
from mikv.quant.tier import Tier


def expected_attention(
    keep: float = 0.2, sinks: int = 4, future: int = 512, epsilon: float = 0.0, heads: str = "alike"
) -> Policy:
    """
    Args:
        keep: share of the prompt's tokens that stay, the sinks among them. What comes later stays.
        sinks, future, epsilon: see mikv.importance.expected.Expected.
        heads: keep `alike`; or share a `layer`'s budget, each at least a fifth of its own.
    """
    check_choice("expected_attention: heads", heads, ("alike", "layer"))
    budget: Budget = kept("expected_attention", keep, "fixed")
    options = describe_options(sinks=(sinks, 4), future=(future, 512), epsilon=(epsilon, 0.0), heads=(heads, "alike"))
    return Policy(
        name="expected_attention",
        label=f"expected attention {percent(keep)}{options}",
        tiers=(Tier(16), Tier(0)),
        budget=budget if heads == "alike" else AcrossHeads(budget),
        importance=Expected(sinks, future, epsilon),
        sinks=sinks,
        every=0,
    )
