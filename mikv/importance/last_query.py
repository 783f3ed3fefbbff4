"""The attention of the last query alone (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.importance.base import Context, Observer
from mikv.importance.scores import ColumnSums

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LastQuery:
    """Attention of the newest query, the mean over all heads of a layer; what was before is forgotten.

    All heads of a layer rank their tokens alike, so they hold the same ones, in the same slots: a mean over heads, slot by
    slot, is one over tokens.
    """

    @property
    def observer(self) -> Observer:
        return ColumnSums(last=1)

    def score(self, context: Context) -> Tensor:
        import torch

        if context.observed is None:
            return torch.zeros(context.positions.shape, dtype=torch.float32, device=context.positions.device)
        return _over_heads(context.observed)

    def update(self, scores: Tensor, mass: Tensor, queries: Tensor) -> Tensor:
        return _over_heads(mass)


def _over_heads(x: Tensor) -> Tensor:
    return x.mean(dim=-2, keepdim=True).expand_as(x).contiguous()
