"""A policy is a tier assignment: per layer, KV head and token, in which tier does this pair live?

It is data (importance x budget x tiers x schedule) and has no state. Eviction is quantization to zero bits, so H2O,
StreamingLLM, uniform quantization and MiKV are all instances of this one class; the store, the packing, the attention and the
byte counter never ask which one they serve.

Tiers are ordered from best to worst. The budget says how many tokens each tier but the last holds; the last takes the rest.
Order of precedence for the better tiers: protected tokens (the first `sinks`, the last `window`), then the most recent ones
(`recent` = their part of the first tier's budget), then the highest scores. Tiers only go down: a token that has left a tier
never comes back.
The ranking and the assignment: mikv/assignment.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mikv.budget import EVERYTHING, Amounts, Budget
from mikv.identity import identity_of
from mikv.importance.base import Importance, Observer
from mikv.options import check_choice
from mikv.quant.tier import Tier
from mikv.shares import check_ratio, exact


@dataclass(frozen=True)
class Policy:
    """importance x budget x tiers x schedule.

    Args:
        name: which policy (a YAML of conf/policy).
        label: name with parameters, as in tables and legends.
        tiers: from best to worst. One whose code takes tokens in blocks is the last: what does not fill a block stays above it.
        budget: how many tokens each tier but the last holds.
        importance: the score that orders tokens which are neither protected nor recent; None = later is better.
        recent: part of the first tier's budget that is kept for the most recent tokens, in 0..1.
        sinks: the first tokens of the sequence are protected: they come before all others in `sinks_tier` (within its budget),
            and transforms are fitted without them.
        window: so many of the last tokens are protected: they come next, in `window_tier`.
        sinks_tier, window_tier: indices of tiers. A protected token passes through the tiers above its own at once.
        every: tokens move down each so many steps; 1 = at every step, 0 = at the prompt only (what comes later stays in the
            first tier).
        positions: `original` = a token keeps its RoPE position whatever was evicted; `contiguous` = positions are
            re-indexed inside the cache (StreamingLLM).
    """

    name: str
    label: str
    tiers: tuple[Tier, ...]
    budget: Budget = EVERYTHING
    importance: Importance | None = None
    recent: float = 0.0
    sinks: int = 0
    window: int = 0
    sinks_tier: int = 0
    window_tier: int = 0
    every: int = 1
    positions: str = "original"

    def __post_init__(self) -> None:
        if self.budget.tiers not in (None, len(self.tiers)):
            raise ValueError(
                f"{self.name}: {len(self.tiers)} tiers, and a budget for {self.budget.tiers} (all but the last have one)"
            )
        if any(tier.evicted for tier in self.tiers[:-1]):
            raise ValueError("only the last tier can be evicted: what is evicted has nothing to demote to")
        for upper, lower in pairwise(self.tiers):
            if lower.k + lower.v > upper.k + upper.v:
                raise ValueError(
                    f"{self.name}: tiers {upper} and {lower}: important tokens would be held at fewer bits than the others; "
                    "swap the two"
                )
            if upper.block > 1:
                raise ValueError(
                    f"{self.name}: tier {upper} codes {upper.block} tokens together, so none of them can leave it; "
                    "make it the last"
                )
        if len(self.tiers) == 1 and self.tiers[0].block > 1:
            raise ValueError(
                f"{self.name}: its only tier codes {self.tiers[0].block} tokens together; a block that is not full needs a "
                "16-bit tier above it"
            )
        check_ratio(self.name, self.recent)
        object.__setattr__(self, "recent", float(self.recent))  # YAML's 1 and 1.0 are one policy in a record's key
        for name in ("sinks", "window", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{self.name}: {name}={value}: a whole number, not negative")
        for name in ("sinks_tier", "window_tier"):
            if getattr(self, name) not in range(len(self.tiers)):
                raise ValueError(f"{self.name}: {name}={getattr(self, name)}: its tiers are 0 to {len(self.tiers) - 1}")
        check_choice(f"{self.name}: positions", self.positions, ("original", "contiguous"))

    def identity(self) -> dict[str, Any]:
        """All that a policy is but its name and label, for the keys of records: derived, so that a field which a subclass
        adds is in it."""
        identity = identity_of(self, leave_out=("name", "label"))
        assert isinstance(identity, dict)
        return identity

    @property
    def evicts(self) -> bool:
        return self.tiers[-1].evicted

    @property
    def lossless(self) -> bool:
        """Whether every tier holds 16 bits: such a policy has nothing to exercise."""
        return all(tier.exact for tier in self.tiers)

    @property
    def settled(self) -> bool:
        """Whether importance decides at the prompt alone: a tier of its own, right above the last ones, holds the last `window`
        tokens, and quotas are the prompt's. A new token is one of the last and passes by the tiers above theirs, so that
        those keep what the prompt gave them; what leaves the window is the oldest there."""
        alone = self.budget.only(self.window_tier) == self.window > 0
        return alone and self.window_tier == len(self.tiers) - self.budget.whole - 1 and not self.budget.grows

    @property
    def scored(self) -> bool:
        """Whether scores are needed after the prompt."""
        return self.importance is not None and self.every > 0 and not self.settled

    def leaves(self, tier: int) -> bool:
        """Whether tokens may leave a tier after the prompt."""
        return self.every > 0 and tier < len(self.tiers) - 1 and (tier >= self.window_tier or not self.settled)

    @property
    def observers(self) -> frozenset[Observer]:
        """What must be watched during prefill."""
        asked = (self.budget.observer, None if self.importance is None else self.importance.observer)
        return frozenset(observer for observer in asked if observer is not None)

    def in_order(self, tier: int) -> int | None:
        """First position of a tier (of a head that has tokens in it), where it takes in that token and all later ones in their
        order, but for those that importance has kept above; None where the order is another, or not known beforehand. Then
        nothing need be stored to know a token's position but those of the tiers above.
        """
        if self.importance is None and self.settled and tier == self.sinks_tier and self.budget.only(tier) == self.sinks:
            return 0  # the sinks themselves
        first = len(self.tiers) - self.budget.whole
        if (self.importance is not None and not self.settled) or self.evicts or tier < first:
            return None
        if not self.sinks or self.sinks_tier >= first:
            return 0
        # without room some of them come later, and others stay
        return self.sinks if self.budget.room(self.sinks_tier) >= self.sinks else None

    def paper_size(self, head_dim: int) -> float | None:
        """Size in per cent of the 16-bit cache by the paper's formula, from parameters alone; None where the budget is not
        shares of all tokens.

        size = (r bits(hi) + (1 - r) bits(lo)) / 16 with bits(N) = N + 32 / group: what belongs to codes is counted,
        positions, scores and what transforms keep are not.
        """
        if not isinstance(self.budget, Amounts) or any(self.budget.tokens):
            return None
        rest = 1.0 - float(sum(self.budget.shares))
        parts = zip((*self.budget.shares, rest), self.tiers, strict=True)
        return 100 * sum(share * paper_bits(tier, head_dim) for share, tier in parts) / 16


def paper_bits(tier: Tier, head_dim: int) -> float:
    """Mean bits per stored element of keys and values: bits(16) = 16, bits(N) = N + 32 / group, bits(evicted) = 0."""
    return sum(0.0 if chain.code is None else chain.code.size(head_dim) for chain in (tier.key, tier.value)) / 2


def percent(share: float) -> str:
    """0.2 -> '20%', 0.125 -> '12.5%'."""
    return f"{float(exact(share) * 100):g}%"


def describe_options(**options: tuple[Any, object]) -> str:
    """Label suffix of options that differ from their default: describe_options(recent=(0.3, 0.5)) -> ' recent=0.3'; 0 and 0.0
    are one number."""
    return "".join(
        f" {name}={float(value) if isinstance(default, float) else value}"
        for name, (value, default) in options.items()
        if value != default
    )
