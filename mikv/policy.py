"""A policy is a tier assignment: per layer, KV head and token, in which tier does this pair live?

It is data (importance x budget x tiers) and has no state. Eviction is quantization to zero bits, so H2O, StreamingLLM,
uniform quantization and MiKV are all instances of this one class; the store, the packing, the attention and the byte
counter never ask which one they serve.

Tiers are ordered from best to worst. `shares` says what part of all tokens each tier but the last holds; the last takes
the rest. Who gets the better tiers: the first `sinks` tokens, then the most recent ones (`recent` = their part of the
first tier's budget), then the highest scores. Tiers only go down: a token that has left a tier never comes back.
Who ranks and assigns tokens by it: mikv/assignment.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mikv.identity import identity_of
from mikv.importance.base import Importance
from mikv.options import check_choice
from mikv.types import Tier

if TYPE_CHECKING:  # a policy is data: it can be built and checked before torch is loaded
    from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """importance x budget x tiers.

    Args:
        name: which policy (a YAML of conf/policy).
        label: name with parameters, as in tables and legends.
        tiers: from best to worst.
        shares: part of all tokens that each tier but the last holds, each in 0..1, together at most 1.
        importance: the score that orders tokens which are neither sinks nor recent; None = later is better.
        recent: part of the first tier's budget that is kept for the most recent tokens, in 0..1.
        sinks: the first tokens of the sequence, always in the first tier (within its budget).
        budget: `ratio` = shares of the tokens seen so far, anew at each step (only so is share 1 the full cache);
            `fixed` = shares of the prompt's length, as H2O's generation code does.
        balance: keys of quantized tiers go through the outlier-aware channel balancer.
        positions: `original` = a token keeps its RoPE position whatever was evicted; `contiguous` = positions are
            re-indexed inside the cache (StreamingLLM).
    """

    name: str
    label: str
    tiers: tuple[Tier, ...]
    shares: tuple[float, ...] = ()
    importance: Importance | None = None
    recent: float = 0.0
    sinks: int = 0
    budget: str = "ratio"
    balance: bool = False
    positions: str = "original"

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.tiers) - 1:
            raise ValueError(f"{len(self.tiers)} tiers need {len(self.tiers) - 1} shares (the last takes the rest)")
        if any(tier.evicted for tier in self.tiers[:-1]):
            raise ValueError("only the last tier can be evicted: what is evicted has nothing to demote to")
        for upper, lower in pairwise(self.tiers):
            if lower.k + lower.v > upper.k + upper.v:
                raise ValueError(
                    f"{self.name}: tiers {upper} and {lower}: important tokens would be held at fewer bits than the others; "
                    "swap the two"
                )
        for share in (*self.shares, self.recent):
            check_ratio(self.name, share)
        # YAML's 1 and 1.0 are one share, and one policy in a record's key
        object.__setattr__(self, "shares", tuple(map(float, self.shares)))
        object.__setattr__(self, "recent", float(self.recent))
        if sum(map(exact, self.shares)) > 1:
            raise ValueError(f"{self.name}: shares {self.shares} add up to more than 1 (100 % of the tokens)")
        if self.sinks < 0:
            raise ValueError(f"{self.name}: sinks={self.sinks} is negative")
        check_choice(f"{self.name}: budget", self.budget, ("ratio", "fixed"))
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
        return all(tier.k == tier.v == 16 for tier in self.tiers)

    def quotas(self, lengths: Tensor) -> list[Tensor]:
        """Cumulative budgets: how many tokens the tiers 0..i may hold together, for each i but the last.

        lengths int64 [B] is the number of tokens seen (budget `ratio`) or of the prompt (`fixed`); floor(share * length)
        in exact arithmetic (0.29 * 100 is 28.999... in floating point).
        """
        cumulative: list[Tensor] = []
        total = Fraction(0)
        for share in self.shares:
            total += exact(share)
            cumulative.append(lengths * total.numerator // total.denominator)
        return cumulative

    def paper_size(self, head_dim: int) -> float:
        """Size in per cent of the 16-bit cache by the paper's formula, from parameters alone.

        size = (r bits(hi) + (1 - r) bits(lo)) / 16 with bits(N) = N + 32 / group: scale and minimum are counted,
        positions, scores and the balancer are not.
        """
        rest = 1.0 - float(sum(self.shares))
        parts = zip((*self.shares, rest), self.tiers, strict=True)
        return 100 * sum(share * paper_bits(tier, head_dim) for share, tier in parts) / 16


def paper_bits(tier: Tier, head_dim: int) -> float:
    """Mean bits per stored element of keys and values: bits(16) = 16, bits(N) = N + 32 / group, bits(evicted) = 0."""
    overhead = 32 / tier.group_size(head_dim)
    return sum(bits if bits in (0, 16) else bits + overhead for bits in (tier.k, tier.v)) / 2


def exact(share: float) -> Fraction:
    """The decimal number that was written, not its binary neighbour."""
    try:
        return Fraction(str(share))
    except ValueError as error:
        raise ValueError(f"{share} is no ratio; wanted a part of the tokens between 0 and 1 (0.2 = 20 % kept)") from error


def check_ratio(name: str, share: float) -> None:
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"{name}: {share} is no ratio; wanted a part of the tokens between 0 and 1 (0.2 = 20 % kept)")


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
