"""Scores that keys alone give: no attention is watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mikv.importance.base import Context, OfPrompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyNorm(OfPrompt):
    """-|k|: keys of small norm are those that attention finds (arXiv 2406.11430)."""

    def score(self, context: Context) -> Tensor:
        import torch

        return -torch.linalg.vector_norm(context.keys, dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class KeyDifference(OfPrompt):
    """-cos(k, m), m the mean of the prompt's keys, each of length 1 (arXiv 2504.15364): what differs from the rest."""

    def score(self, context: Context) -> Tensor:
        from torch.nn.functional import cosine_similarity, normalize

        keys = context.keys.float()
        real = (context.positions >= 0)[..., None]
        mean = normalize(keys, dim=-1).masked_fill(~real, 0).sum(dim=3, keepdim=True) / real.sum(dim=3, keepdim=True).clamp(
            min=1
        )
        return -cosine_similarity(keys, mean, dim=-1)
