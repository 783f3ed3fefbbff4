"""Head bits on another cache than ours: the paper's quantizer and balancer, keys at 3 bits in the noisiest heads, else at 2."""

from __future__ import annotations

from mikv.budget import Amounts
from mikv.head_bits import HeadBits
from mikv.policy import Policy
from mikv.quant.tier import Tier


def heads(extra: float = 0.5, sinks: int = 2, window: int = 5) -> Policy:
    """extra: key bits, mean over heads; sinks, window: first and last tokens at 16 bits."""
    return Policy(
        name="heads",
        label="heads",
        tiers=(Tier(16), *(Tier(2, key_bits=bits).balanced() for bits in (3, 2))),
        budget=HeadBits(Amounts((0.0,), (sinks + window,), "prompt"), (3, 2), extra, last=8),
        sinks=sinks,
        window=window,
    )
