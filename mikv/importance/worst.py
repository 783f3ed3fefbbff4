"""The attention of the one query that wants a token most (DefensiveKV, arXiv 2510.13334): the worst case, not the mean.

a_qt   attention of a query of the window, averaged over `kernel` neighbours, its sum kept
s_t    = max over the window's queries and a group's heads of a_qt, at least its mean over tokens
score  = s_t |W_o v_t|_1 / sum over KV heads of |W_o v_t|_1,  but the tokens that make up 0.9 of the mean attention come first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.importance.base import Context, Observer, ObserverState, OfPrompt
from mikv.importance.pooled import Pooled, neighbours, output_norms
from mikv.shares import part
from mikv.types import Geometry, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHOSEN = 1e10  # above every score


@dataclass(frozen=True)
class WindowAttention:
    """Observer of the last queries: the largest attention that a token gets, pooled, and the mean one, not pooled, over these
    and the query heads of a group. Of tokens before the window; 0 in it."""

    last: int
    kernel: int

    shown = "block"

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> WindowAttentionState:
        return WindowAttentionState(self, geometry, lengths, device)

    def combine(self, before: Tensor, after: Tensor) -> Tensor:
        raise NotImplementedError("none of its queries lies in a prefix")


class WindowAttentionState(ObserverState):
    def __init__(self, asked: WindowAttention, geometry: Geometry, lengths: Lengths, device: torch.device) -> None:
        import torch

        shape = (geometry.layers, len(lengths.tokens), geometry.kv_heads, lengths.width, 2)
        self._found = torch.zeros(shape, dtype=torch.float32, device=device)
        self._asked, self._columns = asked, max(0, lengths.width - asked.last)

    def block(self, layer: int, probs: Tensor, first: int, real_queries: Tensor) -> None:
        seen = probs[..., : self._columns].masked_fill(~real_queries[:, None, None, :, None], 0)
        if not self._columns:
            return
        pooled = neighbours(seen, self._asked.kernel)
        pooled = pooled / pooled.sum(dim=-1, keepdim=True).clamp(min=1e-30) * seen.sum(dim=-1, keepdim=True)
        found = self._found[layer, :, :, : self._columns]
        found[..., 0] = found[..., 0].maximum(pooled.amax(dim=(2, 3)))
        found[..., 1] += seen.mean(dim=2).sum(dim=2) / self._asked.last

    def result(self) -> Tensor:
        """[L, B, H, T, 2]: the largest, the mean."""
        return self._found


@dataclass(frozen=True)
class WorstCase(OfPrompt):
    """
    Args:
        window, kernel: see mikv.importance.pooled.Pooled.
        keep: share of the prompt that each head keeps on average: no more are chosen by the mean attention.
        mass: so much of the mean attention is kept whatever the values are.
    """

    window: int
    kernel: int
    keep: float
    mass: float = 0.9

    def __post_init__(self) -> None:
        Pooled(self.window, self.kernel)  # refuses what is no window and no kernel

    @property
    def observer(self) -> Observer:
        return WindowAttention(self.window, self.kernel)

    def score(self, context: Context) -> Tensor:
        import torch

        if context.observed is None:
            return torch.zeros(context.positions.shape, dtype=torch.float32, device=context.positions.device)
        largest, mean = context.observed.unbind(dim=-1)
        before = (context.positions >= 0) & (context.positions < self._window(context))
        number = before.sum(dim=-1, keepdim=True).clamp(min=1)
        worst = largest.maximum(largest.sum(dim=-1, keepdim=True) / number)
        norms = output_norms(context)
        scores = worst * norms / norms.sum(dim=2, keepdim=True).clamp(min=1e-30)
        return scores.masked_fill(self._by_mass(mean, before, context) & before, _CHOSEN)

    def _window(self, context: Context) -> Tensor:
        return context.seen.to(context.positions.device)[:, None, None] - self.window

    def _by_mass(self, mean: Tensor, before: Tensor, context: Context) -> Tensor:
        """The tokens with the most mean attention that together stay below `mass`, bool [L, B, H, T]. Of it is taken off what
        the last tokens before the window receive, as many as a window has, in the mean over heads: as the authors do."""
        from mikv.tensors import ranks

        late = before & (context.positions >= self._window(context) - self.window)
        wanted = self.mass - mean.masked_fill(~late, 0).sum(dim=-1).mean(dim=2)[..., None, None]
        share = (mean / mean.sum(dim=-1, keepdim=True).clamp(min=1e-30)).masked_fill(~before, -1)
        place = ranks(share)
        falling = share.sort(dim=-1, descending=True).values.clamp(min=0)
        count = (falling.cumsum(dim=-1) < wanted).sum(dim=-1)
        most = (part(self.keep, context.prompt_lengths) - self.window).clamp(min=0)
        return place < count.minimum(most.to(count.device)[:, None])[..., None]
