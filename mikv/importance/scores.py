"""The scores that the project's policies use: attention accumulated, per query, or of late; noise. (Recency is a policy without
a score.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.importance.base import Context, Observer, ObserverState, OfPrompt
from mikv.randomness import uniform
from mikv.types import Geometry, Lengths

if TYPE_CHECKING:  # a policy names its score before torch is loaded
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ColumnSums:
    """Observer: sum over a prompt's queries and the query heads of a group of each key's attention probability.

    last: only so many of the last queries; None = all.
    """

    last: int | None = None

    shown = "block"

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ValueError(f"an observer of the last {self.last} queries sees nothing; at least 1, or null for all")

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> ColumnSumsState:
        return ColumnSumsState(geometry, lengths, device)

    def combine(self, before: Tensor, after: Tensor) -> Tensor:
        return before + after


class ColumnSumsState(ObserverState):
    """May be shown a layer block by block, or be given its sums by a kernel that never makes the probabilities."""

    def __init__(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> None:
        import torch

        shape = (geometry.layers, len(lengths.tokens), geometry.kv_heads, lengths.width)
        self._sums = torch.zeros(shape, dtype=torch.float32, device=device)

    def add(self, layer: int, received: Tensor) -> None:
        """Attention that the first T' columns received, float32 [B, H, T']."""
        self._sums[layer, :, :, : received.shape[-1]] += received

    def block(self, layer: int, probs: Tensor, first: int, real_queries: Tensor) -> None:
        import torch

        real = real_queries.to(probs.dtype)[:, None, None, None]  # a query that is padding counts nothing
        # [1, q] x [q, T'] per head, then the group: einsum would bring the probabilities into another order first, which
        # takes ten times as long
        self.add(layer, torch.matmul(real, probs).sum(dim=(2, 3)))

    def result(self) -> Tensor:
        return self._sums


@dataclass(frozen=True)
class Accumulated:
    """H2O's score (arXiv 2306.14048): the running sum of attention a token has received, no decay, no normalization.

    Over the query heads of a group the sum is taken (our convention for grouped-query attention; the paper has none).
    """

    @property
    def observer(self) -> Observer:
        return ColumnSums()

    def score(self, context: Context) -> Tensor:
        import torch

        if context.observed is not None:
            return context.observed
        return torch.zeros(context.positions.shape, dtype=torch.float32, device=context.positions.device)

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        return scores + mass


@dataclass(frozen=True)
class PerQuery(Accumulated):
    """Accumulated attention over the number of queries that could see the token: a sum favours what came early."""

    def score(self, context: Context) -> Tensor:
        return super().score(context) / (context.seen.to(context.positions.device)[:, None, None] - context.positions)

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        return scores + (mass - scores) / queries


@dataclass(frozen=True)
class Late(Accumulated):
    """Attention of late: of the prompt's last queries (as in SnapKV, arXiv 2404.14469), which fades as new ones come.

    Args:
        last: so many queries; an older one's attention counts (1 - 1 / last)^age.
    """

    last: int = 32

    def __post_init__(self) -> None:
        ColumnSums(self.last)  # refuses what is no number of queries

    @property
    def observer(self) -> Observer:
        return ColumnSums(self.last)

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        return scores * (1 - 1 / self.last) + mass


@dataclass(frozen=True)
class Noise(OfPrompt):
    """A random score per prompt, layer, head and position: the floor that importance must beat.

    Counter-based (a hash of what it belongs to), so that a prompt gets the same noise alone and in any batch.
    """

    seed: int = 0

    def score(self, context: Context) -> Tensor:
        import torch

        positions = context.positions
        head = torch.arange(positions.shape[2], device=positions.device)[:, None]
        prompts = context.prompts.to(positions.device)[:, None, None]
        layers = context.layers[:, None, None, None]
        x = prompts * 0x5851F42D4C957F2D + layers * 0x14057B7EF767814F + head * 0x27BB2EE687B0B0FD
        x = x + positions * 0x2545F4914F6CDD1D + self.seed
        return ((uniform(x) * 2**24).floor() / 2**24).to(torch.float32)  # what float32 holds exactly
