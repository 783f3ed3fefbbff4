"""Scores from the attention of a prompt's last queries (SnapKV, arXiv 2404.14469), and what others make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.importance.base import Context, Observer, OfPrompt
from mikv.importance.scores import ColumnSums
from mikv.shares import part

if TYPE_CHECKING:
    from torch import Tensor

_CHOSEN = 1e10  # above every attention: a token that an earlier stage has chosen


@dataclass(frozen=True)
class Pooled(OfPrompt):
    """Mean attention of the last `window` queries, averaged over `kernel` neighbours: they belong together.

    s_t = 1 / kernel sum_{|u - t| <= kernel / 2} 1 / window sum_q p_qu. The window's own tokens count nothing: they are
    protected. Over the query heads of a group the sum is taken.
    """

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        ColumnSums(self.window)  # refuses what is no number of queries
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: neighbours and the token itself, an odd number")

    @property
    def observer(self) -> Observer:
        return ColumnSums(last=self.window)

    def score(self, context: Context) -> Tensor:
        return neighbours(self.attention(context), self.kernel)

    def attention(self, context: Context) -> Tensor:
        """Mean over the window's queries, sum over the group, float32 [L, B, H, T]; 0 in the window."""
        if context.observed is None:
            return context.positions.new_zeros(context.positions.shape).float()
        late = context.positions >= context.seen.to(context.positions.device)[:, None, None] - self.window
        return context.observed.masked_fill(late, 0) / self.window


def neighbours(x: Tensor, kernel: int) -> Tensor:
    """Mean over `kernel` neighbours along the last axis; what lies outside counts as 0."""
    from torch.nn.functional import avg_pool1d

    if not x.numel():
        return x
    return avg_pool1d(x.flatten(0, -2).unsqueeze(1), kernel, stride=1, padding=kernel // 2).view(x.shape)


@dataclass(frozen=True)
class Critical(OfPrompt):
    """CriticalKV (arXiv 2502.03805): the attention times how far the token's value moves the layer's output.

    s' = (s + epsilon) mean_h |W_o^h v|_1, s the mean over a group of what `attention` scores; but those that are best by s
    alone, `first` of the prompt's tokens with the protected ones, come before all.
    """

    attention: Pooled
    first: float
    epsilon: float = 1e-4

    @property
    def observer(self) -> Observer:
        return self.attention.observer

    def score(self, context: Context) -> Tensor:
        from mikv.tensors import ranks

        scores, norms = self.attention.score(context), output_norms(context)
        if context.observed is None:
            return scores
        assert context.output_projection is not None
        group = context.output_projection(0).shape[1] // scores.shape[2]
        number = part(self.first, context.prompt_lengths)
        by_attention = scores.masked_fill(context.protected, float("inf")).masked_fill(context.positions < 0, -float("inf"))
        chosen = ranks(by_attention) < number.to(scores.device)[:, None, None]
        return ((scores / group + self.epsilon) * norms).masked_fill(chosen, _CHOSEN)


def output_norms(context: Context) -> Tensor:
    """mean over the query heads h of a group of |W_o^h v|_1, float32 [L, B, H, T]; once for all policies of a panel."""
    if "output_norms" not in context.memo:
        context.memo["output_norms"] = _output_norms(context)
    return context.memo["output_norms"]


def _output_norms(context: Context) -> Tensor:
    import torch

    assert context.output_projection is not None
    heads, found = context.values.shape[2], []
    for values, layer in zip(context.values, context.layers.tolist(), strict=True):
        weight = context.output_projection(layer).unflatten(1, (heads, -1))  # [hidden, H, G, D]
        of_group = [
            torch.einsum("bhtd,ohd->bhto", values, weight[:, :, g].to(values)).float().abs().sum(dim=-1)
            for g in range(weight.shape[2])
        ]  # a query head at a time: [B, H, T, hidden] is large
        found.append(torch.stack(of_group).mean(dim=0))
    return torch.stack(found)
