"""The quantized cache of transformers as its users run it: a baseline of what happens without care.

`QuantizedCache` (src/transformers/cache_utils.py, backend quanto) codes the whole prompt at once, the newest tokens too; its
residual protects generated tokens only, until they are `residual`: then all is coded. A scale and a minimum for each `group` of
a token's channels (axis 0), keys as they are. Its docstring names KIVI, whose keys have a scale per channel: it is not KIVI.

Deviations: at each flush transformers codes what it has read from its own codes anew; here a token is coded once. With groups
within a token that gives the same codes but for rounded scales. Scales are FP16 here, of the model's type there.
"""

from mikv.budget import Residual
from mikv.policy import Policy, describe_options
from mikv.quant.tier import Tier


def hf_quantized(bits: int = 4, group: int = 64, residual: int = 128) -> Policy:
    """
    Args:
        bits: of keys and values.
        group: channels that share a scale and a minimum; it must divide head_dim.
        residual: generated tokens that stay at 16 bits until there are so many.
    """
    return Policy(
        name="hf_quantized",
        label=f"hf quantized {bits}" + describe_options(group=(group, 64), residual=(residual, 128)),
        tiers=(Tier(16), Tier(bits, group=group)),
        budget=Residual(residual, "generated"),
    )
