"""The two kinds of step that a way to store is made of: transforms, then one code.

    stored = code(step_n(... step_1(x)))      read = undo_1(... undo_n(decode(stored)))

Each is a frozen dataclass in a file of its own (mikv/quant/transforms, mikv/quant/codes) and has no state: what a transform
was fitted to is a `Side`, whose bytes are counted with the cache. Vectors are float32 [L, B, H, S, D] throughout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:  # a way to store is data: it can be checked before torch is loaded
    import torch
    from torch import Tensor

    from mikv.rope import Rope

Parts = dict[str, "Tensor"]
"""What a code stores, by name of the part: [L, B, H, S, *], or [L, B, H, S / block, *] where the code says `per_block`."""

Side = dict[str, "Tensor"]
"""What a transform was fitted to, by name: [L, B, H, *]."""


class Queries(NamedTuple):
    """The queries that will meet the keys, channel by channel: largest |q| and mean q^2, float32 [L, B, H, D], over the real
    queries of the prompt and the query heads of a group."""

    absmax: Tensor
    square: Tensor


class Sample(NamedTuple):
    """The prompt that a transform is fitted on.

    x: what the steps before it made of keys or values, float32 [L, B, H, T, D]; real: bool [B, T], False where x must not count
    (padding, first tokens that are kept exact); positions: int64 [B, T]; queries: after the adjoints of the steps before it;
    None for values; rope: of the model, None where its frequencies are not fixed.
    """

    x: Tensor
    real: Tensor
    positions: Tensor
    queries: Queries | None = None
    rope: Rope | None = None


class Where(NamedTuple):
    """Positions of the vectors, int64 [L, B, H, S] (None where no step asks for them), and the model's RoPE."""

    positions: Tensor | None = None
    rope: Rope | None = None


class Transform(ABC):
    """An affine map of vectors that makes them easier to code."""

    order: ClassVar[int]
    """Steps of a chain come in rising order."""

    @property
    def keys_only(self) -> bool:
        """Whether it needs queries, or RoPE: then it can't be a step of values."""
        return False

    @property
    def needs_positions(self) -> bool:
        """Whether `Where.positions` must be known: they are stored then, and counted."""
        return False

    def check(self, head_dim: int) -> None:
        """Refuse a head dimension that it can't take (ValueError)."""

    def fit(self, sample: Sample) -> Side:
        """What it must know of a prompt; frozen while decoding."""
        return {}

    @abstractmethod
    def apply(self, x: Tensor, side: Side, where: Where) -> Tensor: ...

    @abstractmethod
    def undo(self, y: Tensor, side: Side, where: Where) -> Tensor:
        """The inverse of `apply`."""

    @abstractmethod
    def query(self, q: Tensor, side: Side) -> Tensor:
        """The adjoint of `undo`'s linear part, for keys: q . undo(y) = query(q) . y + shift(q). q float32 [L, B, H, G, D]."""

    def shift(self, q: Tensor, side: Side, where: Where) -> Tensor | None:
        """The part of q . undo(y) that does not depend on y, float32 [L, B, H, G, S or 1]; None = there is none."""
        return None

    def output(self, o: Tensor, weight: Tensor, side: Side) -> Tensor:
        """For values: undo of a weighted sum, sum_t p_t undo(y_t) = output(sum_t p_t y_t, sum_t p_t). o float32
        [L, B, H, G, D], weight [L, B, H, G, 1]."""
        raise NotImplementedError("a step of keys")

    def after(self, queries: Queries, side: Side) -> Queries | None:
        """What `query` makes of the queries' statistics; None = they are not known channel by channel any more."""
        return None


class Code(ABC):
    """Numbers in few bits."""

    bits: int
    """Of a number, without what belongs to a vector or a block."""
    block: int = 1
    """Tokens that are coded together: they come and stay as a block."""
    per_block: ClassVar[frozenset[str]] = frozenset()
    """Parts that a block has once."""

    def check(self, head_dim: int) -> None:
        """Refuse a head dimension that it can't take (ValueError)."""

    @abstractmethod
    def encode(self, y: Tensor, storage: torch.dtype) -> Parts:
        """y float [..., S, D], finite, S a multiple of `block`; storage: the 16-bit dtype of the cache."""

    @abstractmethod
    def decode(self, parts: Parts) -> Tensor:
        """float32 [..., S, D]."""

    @abstractmethod
    def size(self, head_dim: int) -> float:
        """Stored bits of a number, scales and the like included."""


def storage_dtype(compute: torch.dtype) -> torch.dtype:
    """dtype of what is stored at 16 bits: the model's own if it has 16 bits, else FP16 (a float32 model stores 16 bits too)."""
    import torch

    return compute if compute in (torch.float16, torch.bfloat16) else torch.float16
