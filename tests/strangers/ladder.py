"""A ladder of four tiers with keys above values: 16 bits, 8, k4v3 and k3v2, re-ranked every eight steps; sinks at 16 bits, the
last tokens at 8."""

from __future__ import annotations

from mikv.budget import Amounts
from mikv.importance.scores import Accumulated
from mikv.policy import Policy
from mikv.quant.tier import Tier


def ladder(sinks: int = 2, window: int = 6, every: int = 8) -> Policy:
    """sinks: at 16 bits; window: last tokens, at 8 bits; every: steps between two rankings."""
    coded = ["centre/after", "balance/rms", "rotate"]
    return Policy(
        name="ladder",
        label="ladder",
        tiers=(
            Tier(16),
            Tier(8),
            Tier(key=[*coded, "codebook4"], value=["rotate", "codebook3"]),
            Tier(key=["centre", "balance/rms", "rotate", "codebook3"], value=["rotate", "codebook2"]),
        ),
        budget=Amounts((0.0, 0.1, 0.3), (sinks, window, 0)),
        importance=Accumulated(),
        sinks=sinks,
        window=window,
        window_tier=1,
        every=every,
    )
