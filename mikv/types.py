"""The vocabulary of the project. Imports nothing of it.

Shapes, in every docstring:

    L layers   B sequences of a batch   P policies of a panel   R = P * B rows, policy-major
    Hq query heads   H key/value heads   G = Hq / H   T tokens   D head_dim   S slots of a store

A token's *position* counts the real tokens before it. A *column* is its place in a left-padded batch:
column = position + padding of its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # a tier is data: it can be checked before torch is loaded
    import torch
    from torch import Tensor

BITS = (16, 8, 4, 3, 2, 0)


@dataclass(frozen=True)
class Tier:
    """How a key/value pair is stored.

    Args:
        bits: 16, 8, 4, 3, 2, or 0 (evicted: nothing is stored), for keys and values alike.
        key_bits, value_bits: the same for one of the two; keys usually need more.
        group: channels that share a scale and a minimum; null = head_dim / 2, the paper's choice (a half never mixes
            the two halves that RoPE rotates into each other).
    """

    bits: int = 16
    key_bits: int | None = None
    value_bits: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits is not None and bits not in BITS:
                raise ValueError(f"{name}={bits}: a tier holds {', '.join(map(str, BITS))} bits (0 = evicted)")
        if (self.k == 0) != (self.v == 0):
            raise ValueError(
                f"key_bits={self.k}, value_bits={self.v}: a pair is evicted whole; a key without its value (or the "
                "other way round) would be bytes that nothing can use"
            )
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: channels per scale, at least 1")

    @property
    def k(self) -> int:
        """Bits of a key element."""
        return self.bits if self.key_bits is None else self.key_bits

    @property
    def v(self) -> int:
        """Bits of a value element."""
        return self.bits if self.value_bits is None else self.value_bits

    @property
    def evicted(self) -> bool:
        return self.k == 0

    def group_size(self, head_dim: int) -> int:
        """Channels per scale for a head of `head_dim` channels."""
        group = head_dim // 2 if self.group is None else self.group
        if head_dim % group:
            raise ValueError(f"group={group} does not divide head_dim={head_dim}: some channels would have no scale")
        return group

    def __str__(self) -> str:
        return str(self.k) if self.k == self.v else f"k{self.k}v{self.v}"


class Geometry(NamedTuple):
    """What of a model's architecture the cache must know."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


class Lengths(NamedTuple):
    """How a left-padded batch is filled: real tokens of each row, int64 [B] on the CPU, and the number of columns."""

    tokens: Tensor
    width: int

    @property
    def padding(self) -> Tensor:
        """Columns of padding at the left of each row, int64 [B]."""
        return self.width - self.tokens

    def positions(self, device: torch.device) -> Tensor:
        """Position of the token in each column, int64 [B, T]; negative = padding."""
        import torch

        return (torch.arange(self.width) - self.padding[:, None]).to(device)
