"""Which token goes into which tier of a policy: ranking, and the assignment of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from mikv.policy import Policy, exact

PADDING = -1  # tier index of a column that holds no token

# Classes of priority in one float64 number: noise and attention sums stay far below the recent ones, those below sinks.
_SCORE_LIMIT, _RECENT, _SINK = 1e11, 1e12, 2e12


def priority(policy: Policy, scores: Tensor | None, positions: Tensor, seen: Tensor, first_quota: Tensor) -> Tensor:
    """One float64 number per token by which tokens are ranked: sinks, then recent ones, then scores.

    scores [..., n] (None = later is better), positions int64 [..., n] (negative = no token: lowest), seen and
    first_quota broadcast to them.
    """
    recent = exact(policy.recent)
    recents = first_quota * recent.numerator // recent.denominator
    place = positions.to(torch.float64)  # 2e12 + 1 is no float32
    value = place if scores is None else scores.to(torch.float64)
    value = value.clamp(-_SCORE_LIMIT, _SCORE_LIMIT)
    value = torch.where(positions >= seen - recents, _RECENT + place, value)
    value = torch.where(positions < policy.sinks, _SINK - place, value)
    return torch.where(positions < 0, -torch.inf, value)


def assign(policy: Policy, scores: Tensor | None, positions: Tensor, seen: Tensor, budget_lengths: Tensor) -> Tensor:
    """Tier of every prompt token: int8, the index of a tier, PADDING where there is no token.

    Args:
        scores: float32 [L, B, H, T], or None for a policy without importance.
        positions: int64 [L, B, H, T], negative = padding.
        seen: int64 [B], real tokens.
        budget_lengths: int64 [B], the length that budgets are shares of.
    """
    quotas = [quota[None, :, None, None] for quota in policy.quotas(budget_lengths)]
    tier = torch.zeros_like(positions)
    if quotas:
        value = priority(policy, scores, positions, seen[None, :, None, None], quotas[0])
        # ties go to the later token, as in decoding: flipped, so that the stable sort meets it first
        order = value.flip(-1).argsort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, ranks).flip(-1)
        for quota in quotas:
            tier += rank >= quota
    return torch.where(positions >= 0, tier, PADDING).to(torch.int8)
