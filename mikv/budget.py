"""How many tokens each tier may hold: shares, numbers, bytes; per layer; per head.

Quotas are cumulative: how many tokens the tiers 0..i may hold together, for each tier but the last, which takes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from mikv.importance.base import Context, Observer
from mikv.options import check_choice
from mikv.shares import check_ratio, exact, part

if TYPE_CHECKING:  # a policy is data: it can be built and checked before torch is loaded
    from torch import Tensor


ALL = 2**40
"""More tokens than there are."""


class Budget(Protocol):
    """To be inherited from."""

    @property
    def observer(self) -> Observer | None:
        """What it wants to have been watched during prefill (`observed` of `Context.everywhere`), or None."""
        return None

    @property
    def whole(self) -> int:
        """So many of the last tiers hold, of a layer and head, all tokens that leave those above them, or none."""
        return 1

    def room(self, tier: int) -> int:
        """So many tokens have room in the tiers up to this one, whatever the length is."""
        return 0

    def only(self, tier: int) -> int | None:
        """So many tokens a tier holds, whatever the length is and whoever asks; None where there is no such number."""
        return None

    @property
    def tiers(self) -> int | None:
        """How many tiers it is for; None = any number."""
        ...

    @property
    def grows(self) -> bool:
        """Whether quotas are derived anew at each step, from lengths alone; else they are those of the prompt, for good."""
        ...

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        """int64 [tiers - 1, L or 1, B, H or 1] on the CPU.

        scores: float32 [L, B, H, T] of the prompt; None where the policy has none, and at a step.
        """
        ...


@dataclass(frozen=True)
class Amounts(Budget):
    """A number of tokens and a share of all tokens for each tier but the last.

    Args:
        shares: in 0..1, together at most 1.
        tokens: added to them; () = none.
        of: what shares are of: `seen` = the tokens seen so far, anew at each step (only so is share 1 the full cache), or
            `prompt` = the prompt, as H2O's generation code does.
    """

    shares: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    of: str = "seen"

    def __post_init__(self) -> None:
        # YAML's 1 and 1.0 are one share, and one policy in a record's key
        for share in self.shares:
            check_ratio("budget", share)
        object.__setattr__(self, "shares", tuple(map(float, self.shares)))
        object.__setattr__(self, "tokens", tuple(self.tokens) or (0,) * len(self.shares))
        if len(self.tokens) != len(self.shares):
            raise ValueError(
                f"budget: {len(self.shares)} shares and {len(self.tokens)} numbers of tokens; one of each per tier"
            )
        if sum(map(exact, self.shares)) > 1:
            raise ValueError(f"budget: shares {self.shares} add up to more than 1 (100 % of the tokens)")
        for tokens in self.tokens:
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise ValueError(f"budget: tokens={tokens}: a number of tokens, 0 or more")
        check_choice("budget", self.of, ("seen", "prompt"))

    @property
    def tiers(self) -> int:
        return len(self.shares) + 1

    def room(self, tier: int) -> int:
        return sum(self.tokens[: tier + 1])

    def only(self, tier: int) -> int | None:
        return self.tokens[tier] if tier < len(self.tokens) and not self.shares[tier] else None

    @property
    def grows(self) -> bool:
        return self.of == "seen"

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        import torch

        lengths = context.seen if self.of == "seen" else context.prompt_lengths
        counts = self.counts(lengths)
        return torch.stack(counts)[:, None, :, None] if counts else lengths.new_zeros((0, 1, len(lengths), 1))

    def counts(self, lengths: Tensor) -> list[Tensor]:
        """Cumulative, of lengths int64 [...]: floor(share * length) in exact arithmetic (0.29 * 100 is 28.999... in floating
        point), plus tokens."""
        cumulative: list[Tensor] = []
        share, tokens = Fraction(0), 0
        for of_all, number in zip(self.shares, self.tokens, strict=True):
            share, tokens = share + exact(of_all), tokens + number
            cumulative.append(lengths * share.numerator // share.denominator + tokens)
        return cumulative


@dataclass(frozen=True)
class Bytes(Budget):
    """As many tokens in the better of two tiers as bytes allow.

    Args:
        size: stored bytes of a head over those of its 16-bit cache, above 0. What does not fit even with every token in the
            last tier is as small as that.
        of: see Amounts.
    """

    size: float
    of: str = "seen"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int | float) or not self.size > 0:
            raise ValueError(f"budget: size={self.size}: a part of the 16-bit cache, above 0 (0.2 = 20 % of the bytes)")
        object.__setattr__(self, "size", float(self.size))
        check_choice("budget", self.of, ("seen", "prompt"))

    @property
    def tiers(self) -> int:
        return 2

    @property
    def grows(self) -> bool:
        return self.of == "seen"

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        import torch

        lengths = context.seen if self.of == "seen" else context.prompt_lengths
        high, low = (Fraction(size) for size in context.token_bytes)
        if high <= low:
            raise ValueError("budget: a token of the first tier takes no more than one of the last; nothing is to be chosen")
        full = 4 * context.keys.shape[-1]  # keys and values, two bytes each
        found = []
        for length in lengths.tolist():
            left = exact(self.size) * full * length - Fraction(context.side_bytes) - low * length
            found.append(max(0, min(length, left // (high - low))))
        return torch.tensor(found).view(1, 1, -1, 1)


@dataclass(frozen=True)
class Residual(Budget):
    """The first of two tiers holds what has come since it was last emptied, which is after each so many tokens.

    Args:
        length: after so many it is emptied.
        of: what is counted: tokens `seen`, so that the prompt's end may be in it; or `generated` ones, so that a prompt is
            never.
    """

    length: int
    of: str = "seen"

    tiers = 2
    grows = True

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"budget: length={self.length}: a number of tokens, at least 1")
        check_choice("budget", self.of, ("seen", "generated"))

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        counted = context.seen if self.of == "seen" else (context.seen - context.prompt_lengths).clamp(min=0)
        return (counted % self.length)[None, None, :, None]


class WholeLayers(Budget):
    """All tokens of a layer in one tier, which one `place` says. To be inherited from."""

    grows = False

    @property
    def whole(self) -> int:
        assert self.tiers is not None
        return self.tiers

    def place(self, layer: int, total: int) -> int:
        """Index of the tier of a layer, of so many in total."""
        raise NotImplementedError

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        import torch

        assert self.tiers is not None
        places = torch.tensor([self.place(layer, context.total_layers) for layer in context.layers.tolist()])
        held = places <= torch.arange(self.tiers - 1)[:, None]
        return (ALL * held)[:, :, None, None].expand(-1, -1, len(context.prompt_lengths), -1)


@dataclass(frozen=True)
class Boundary(WholeLayers):
    """The first and the last layers hold everything in the first of two tiers, the others in the second.

    Args:
        layers: so many at each end.
    """

    layers: int

    tiers = 2

    def __post_init__(self) -> None:
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 0:
            raise ValueError(f"budget: layers={self.layers}: a number of layers, 0 or more")

    def place(self, layer: int, total: int) -> int:
        return int(self.layers <= layer < total - self.layers)


@dataclass(frozen=True)
class PerLayer(Budget):
    """Another budget's quotas, times a factor for each layer.

    Args:
        budget: whose.
        factors: of all layers, from the first to the last.
    """

    budget: Budget
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(map(float, self.factors)))
        if not all(factor >= 0 for factor in self.factors):
            raise ValueError(f"budget: factors={self.factors}: one for each layer, 0 or more")

    @property
    def tiers(self) -> int | None:
        return self.budget.tiers

    @property
    def grows(self) -> bool:
        return self.budget.grows

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        import torch

        if len(self.factors) != context.total_layers:
            raise ValueError(f"budget: {len(self.factors)} factors for a model of {context.total_layers} layers; one for each")
        factors = torch.tensor([self.factors[layer] for layer in context.layers.tolist()], dtype=torch.float64)
        return (self.budget.quotas(scores, context) * factors[None, :, None, None]).floor().long()


@dataclass(frozen=True)
class AcrossHeads(Budget):
    """A layer's heads share their quotas as their scores say (AdaKV, arXiv 2407.11550): the tokens with the highest scores of
    all heads together. Settled at the prompt.

    Args:
        budget: what each head would have.
        least: part of it that every head keeps, in 0..1 (AdaKV's safeguard).
    """

    budget: Budget
    least: float = 0.2

    grows = False

    def __post_init__(self) -> None:
        check_ratio("budget: least", self.least)
        object.__setattr__(self, "least", float(self.least))

    @property
    def tiers(self) -> int | None:
        return self.budget.tiers

    def quotas(self, scores: Tensor | None, context: Context) -> Tensor:
        import torch

        from mikv.tensors import ranks

        if scores is None:
            raise ValueError("budget: heads share by scores, and this policy has no importance")
        real = context.positions >= 0
        value = scores.double().masked_fill(context.protected, torch.inf).masked_fill(~real, -torch.inf)
        rank, (heads, tokens) = ranks(value), value.shape[2:]
        each = self.budget.quotas(scores, context).expand(-1, value.shape[0], -1, heads).to(value.device)
        each = each.minimum(real.sum(dim=-1))
        found = []
        for quota in each:  # of a tier: few
            sure = rank < part(self.least, quota)[..., None]
            place = ranks(value.masked_fill(sure, torch.inf).flatten(2))
            found.append((place < quota.sum(dim=-1, keepdim=True)).unflatten(-1, (heads, tokens)).sum(dim=-1))
        return torch.stack(found).cpu()


def kept(name: str, keep: float, budget: str) -> Amounts:
    """A share of tokens in the first of two tiers, as policies take it: of the tokens seen (`ratio`) or of the prompt
    (`fixed`)."""
    check_ratio(name, keep)
    check_choice(f"{name}: budget", budget, ("ratio", "fixed"))
    return Amounts((keep,), of="seen" if budget == "ratio" else "prompt")


EVERYTHING = Amounts()
"""Of a policy with one tier."""
