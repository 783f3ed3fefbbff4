"""The vocabulary of the project. Imports nothing of it.

Shapes, in every docstring:

    L layers   B sequences of a batch   P policies of a panel   R = P * B rows, policy-major
    Hq query heads   H key/value heads   G = Hq / H   T tokens   D head_dim   S slots of a store

A token's *position* counts the real tokens before it. A *column* is its place in a left-padded batch:
column = position + padding of its row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # a policy is data: it can be checked before torch is loaded
    import torch
    from torch import Tensor


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
