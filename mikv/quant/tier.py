"""A tier: how a key/value pair is stored."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from mikv.quant.chain import Chain, Steps, chain_of
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.exact import Exact

_SHORT = re.compile(r"(?P<both>\d+)|k(?P<key>\d+)v(?P<value>\d+)")


@dataclass(frozen=True, init=False)
class Tier:
    """Keys and values have a chain each.

    Args:
        bits: 16, 8, 5, 4, 3, 2, 1, or 0 (evicted: nothing is stored), for keys and values alike: the paper's quantizer.
        key_bits, value_bits: the same for one of the two; keys usually need more.
        group: of the paper's quantizer: channels that share a scale and a minimum; None = head_dim / 2.
        key, value: the chain in full, in the place of bits, see mikv/quant/chain.py.
    """

    key: Chain
    value: Chain

    def __init__(
        self,
        bits: int = 16,
        key_bits: int | None = None,
        value_bits: int | None = None,
        group: int | None = None,
        key: Chain | Steps | None = None,
        value: Chain | Steps | None = None,
    ) -> None:
        if group is not None and group < 1:
            raise ValueError(f"group={group}: channels per scale, at least 1")
        chains = []
        for name, own, steps in (("key_bits", key_bits, key), ("value_bits", value_bits, value)):
            if isinstance(steps, Chain):
                chains.append(steps)
                continue
            if steps is not None and own is not None:
                raise ValueError(f"{name}={own} and {name[:-5]}={steps} both say how it is stored: leave one out")
            try:
                chains.append(chain_of((bits if own is None else own) if steps is None else steps, group))
            except ValueError as error:
                said = name[:-5] if steps is not None else "bits" if own is None else name
                raise ValueError(f"{said}: {error}") from error
        object.__setattr__(self, "key", chains[0])
        object.__setattr__(self, "value", chains[1])
        if (self.k == 0) != (self.v == 0):
            raise ValueError(
                f"key_bits={self.k}, value_bits={self.v}: a pair is evicted whole; a key without its value (or the "
                "other way round) would be bytes that nothing can use"
            )
        if self.block % min(self.key.block, self.value.block):
            raise ValueError(
                f"blocks of {self.key.block} keys and {self.value.block} values: tokens come in whole blocks of both, so the "
                "one must be a multiple of the other"
            )
        for step in self.value.transforms:
            if step.keys_only:
                raise ValueError(f"value: {self.value}: its first steps need queries or RoPE, which values know nothing of")

    @property
    def k(self) -> int:
        """Bits of a key element, without scales and the like."""
        return self.key.bits

    @property
    def v(self) -> int:
        """Bits of a value element."""
        return self.value.bits

    @property
    def evicted(self) -> bool:
        return self.k == 0

    @property
    def exact(self) -> bool:
        """Whether keys and values have 16 bits."""
        return self.k == self.v == 16

    @property
    def kind(self) -> str:
        """Name of its codes, as the kernels know them: that of the first which is not exact; affine where both are."""
        codes = [type(chain.code).__name__.lower() for chain in (self.key, self.value) if not isinstance(chain.code, Exact)]
        return codes[0] if codes else "affine"

    @property
    def block(self) -> int:
        """Tokens that come together; they stay then."""
        return max(self.key.block, self.value.block)

    def check(self, head_dim: int) -> None:
        """Refuse a head dimension that a step can't take (ValueError)."""
        self.key.check(head_dim)
        self.value.check(head_dim)

    def balanced(self) -> Tier:
        """The tier with the paper's balancer before its keys' code, where keys are coded and no step is given."""
        from mikv.quant.transforms.balance import Balance

        if self.k in (0, 16) or self.key.transforms:
            return self
        return Tier(key=replace(self.key, transforms=(Balance(),)), value=self.value)

    @property
    def group(self) -> int | None:
        """Channels per scale of the paper's quantizer, where it is not its own choice."""
        codes = (self.key.code, self.value.code)
        return next((code.group for code in codes if isinstance(code, Affine) and isinstance(code.group, int)), None)

    @property
    def label(self) -> str:
        """Its bits, and its chains where they are others than the paper's quantizer."""
        return (
            str(self)
            if self.balanced() == Tier(self.k, value_bits=self.v, group=self.group).balanced()
            else f"{self} ({self.key} | {self.value})"
        )

    def __str__(self) -> str:
        """Its bits: 4, k4v2."""
        return str(self.k) if self.k == self.v else f"k{self.k}v{self.v}"


def tier_of(written: Tier | str | int) -> Tier:
    """A tier, or one written in short: 16, 4, 0, k4v2.

    Raises:
        ValueError: anything else.
    """
    if isinstance(written, Tier):
        return written
    match = _SHORT.fullmatch(str(written))
    if match is None:
        raise ValueError(f"{written!r} is no tier; wanted bits (16, 4, 0 = evicted), k4v2, or a key and a value in full")
    if match["both"]:
        return Tier(int(match["both"]))
    return Tier(key_bits=int(match["key"]), value_bits=int(match["value"]))


def recoded(written: Tier | str | int, key: Callable[[int], Steps], value: Callable[[int], Steps]) -> Tier:
    """The tier with other chains, made of the number of bits, for keys and values that are given by their bits alone; what is
    at 16 bits, evicted or given in full stays."""
    tier = tier_of(written)
    plain = {what: not chain.transforms and isinstance(chain.code, Affine) for what, chain in vars(tier).items()}
    return Tier(
        key=key(tier.k) if plain["key"] else tier.key,
        value=value(tier.v) if plain["value"] else tier.value,
    )
