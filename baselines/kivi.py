"""KIVI (arXiv 2402.02750): keys per channel over a group of tokens, values per token over a group of channels.

    code = round((x - min) / scale),   scale = (max - min) / (2^bits - 1),   scale and minimum in FP16

Keys have outliers in few channels, and a scale per channel keeps them from the others; values have none. The newest tokens,
the residual, stay at 16 bits: of T the last T mod residual, coded together when they are as many as that. They are counted.

Deviations from jy-yuan/KIVI, models/llama_kivi.py and quant/new_pack.py: values leave the residual with their keys, where the
authors keep the last `residual` values at 16 bits and code one at each step (more bytes: half a residual of values); a
group of equal numbers is exact, where theirs divides by 0.
"""

from mikv.budget import Residual
from mikv.policy import Policy, describe_options
from mikv.quant.tier import Tier


def kivi(bits: int = 2, group: int = 32, residual: int = 128) -> Policy:
    """
    Args:
        bits: of keys and values.
        group: tokens (of keys) and channels (of values) that share a scale and a minimum.
        residual: tokens that are coded together, a multiple of `group`; until then they stay at 16 bits.
    """
    if residual % group:
        raise ValueError(f"kivi: residual={residual} is no multiple of group={group}; whole groups of tokens are coded")
    return Policy(
        name="kivi",
        label=f"kivi {bits}" + describe_options(group=(group, 32), residual=(residual, 128)),
        tiers=(Tier(16), Tier(key=f"channel{bits}/{group}", value=f"affine{bits}/{group}")),
        budget=Residual(residual),
    )
