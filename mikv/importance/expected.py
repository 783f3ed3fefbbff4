"""The attention that a prompt's own queries let expect of later ones (Expected Attention, arXiv 2510.00636).

queries before RoPE are taken as normal, of mean m and covariance S; R is the mean of RoPE's rotations at the next positions
E exp(q . k / sqrt(D)) = exp(k . R m / sqrt(D) + k . R S R^T k / (2 D))
score = (mean over a group of its share of the sum over all tokens + epsilon) |v|
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.importance.base import Context, Observer, ObserverState, OfPrompt
from mikv.types import Geometry, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class QueryMoments:
    """Observer: sums of q q^T and of q over a prompt's queries before RoPE, but for the first `skipped`."""

    skipped: int = 0

    shown = "queries"
    last = None

    def start(self, geometry: Geometry, lengths: Lengths, device: torch.device) -> QueryMomentsState:
        return QueryMomentsState(self.skipped, geometry, lengths, device)

    def combine(self, before: Tensor, after: Tensor) -> Tensor:
        return before + after


class QueryMomentsState(ObserverState):
    def __init__(self, skipped: int, geometry: Geometry, lengths: Lengths, device: torch.device) -> None:
        import torch

        heads, dim = geometry.kv_heads, geometry.head_dim
        shape = (geometry.layers, len(lengths.tokens), heads, geometry.query_heads // heads, dim + 1, dim)
        self._sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self._skipped = skipped

    def queries(self, layer: int, query: Tensor, positions: Tensor) -> None:
        import torch

        wanted = positions >= self._skipped
        query = query.float().masked_fill(~wanted[:, None, None, :, None], 0)
        of_layer = self._sums[layer]
        of_layer[..., :-1, :] += torch.matmul(query.transpose(-1, -2), query)
        of_layer[..., -1, :] += query.sum(dim=-2)

    def result(self) -> Tensor:
        """[L, B, H, G, D + 1, D]: q q^T, and below it q."""
        return self._sums


@dataclass(frozen=True)
class Expected(OfPrompt):
    """
    Args:
        sinks: first tokens, whose queries don't count, and which take no share of the attention.
        future: positions behind the prompt over which RoPE's rotations are averaged.
        epsilon: is added to a token's share.
    """

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0

    @property
    def observer(self) -> Observer:
        return QueryMoments(self.sinks)

    def score(self, context: Context) -> Tensor:
        import torch

        if context.observed is None:
            return torch.zeros(context.positions.shape, dtype=torch.float32, device=context.positions.device)
        if str(self) not in context.memo:  # the same at every budget
            context.memo[str(self)] = self._expected(context)
        return context.memo[str(self)]

    def _expected(self, context: Context) -> Tensor:
        import torch

        assert context.observed is not None
        count = (context.seen - self.sinks).clamp(min=1).to(context.positions.device)[:, None, None, None]
        mean = context.observed[..., -1, :] / count
        covariance = context.observed[..., :-1, :] / count[..., None] - mean[..., :, None] * mean[..., None, :]
        turn = self._rotations(context)[:, None, None]  # [B, 1, 1, D, D]
        mean = torch.matmul(turn, mean[..., None])[..., 0]
        covariance = turn @ covariance @ turn.transpose(-1, -2)
        counted, dim = context.positions >= self.sinks, mean.shape[-1]
        found = torch.zeros_like(counted, dtype=torch.float32)
        keys = context.keys.float()
        for g in range(mean.shape[3]):  # [L, B, H, T, D] once, not for each query head
            logits = torch.matmul(keys, mean[..., g, :, None])[..., 0] / dim**0.5
            logits += (torch.matmul(keys, covariance[:, :, :, g]) * keys).sum(dim=-1) / (2 * dim)
            found += torch.softmax(logits.masked_fill(~counted, -torch.inf), dim=-1).nan_to_num(0.0)
        norms = torch.linalg.vector_norm(context.values, dim=-1, dtype=torch.float32)
        return (found / mean.shape[3] + self.epsilon) * norms

    def _rotations(self, context: Context) -> Tensor:
        """R, float32 [B, D, D], by the end of each prompt."""
        import torch

        assert context.rope is not None
        dim, device = context.keys.shape[-1], context.keys.device
        unit = torch.eye(dim, device=device).expand(self.future, -1, -1)
        places = torch.arange(self.future, device=device)[:, None].expand(-1, dim)
        ends = context.seen.tolist()
        turned = [context.rope.turn(unit, places + end, end + self.future).mean(dim=0).T for end in ends]
        return torch.stack(turned)
