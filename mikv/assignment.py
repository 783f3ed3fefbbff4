"""Which token goes into which tier of a policy: ranking, the assignment of a prompt, and the tokens that leave a tier."""

from __future__ import annotations

import torch
from torch import Tensor

from mikv.policy import Policy
from mikv.shares import part
from mikv.tensors import ranks

PADDING = -1  # tier index of a column that holds no token

# Classes of priority in one float64 number: noise and attention sums stay far below the recent ones, those below a window's,
# those below sinks.
_SCORE_LIMIT, _RECENT, _WINDOW, _SINK = 1e11, 1e12, 2e12, 3e12


def priority(policy: Policy, tier: int, scores: Tensor | None, positions: Tensor, seen: Tensor, first_quota: Tensor) -> Tensor:
    """One float64 number per token by which tokens are ranked in a tier: sinks, then a window, then recent ones, then scores.

    scores [..., n] (None = later is better), positions int64 [..., n] (negative = no token: lowest), seen and
    first_quota (of the first tier) broadcast to them. Protected tokens of a tier below are lowest: they go on to it.
    """
    recents = part(policy.recent, first_quota)
    place = positions.to(torch.float64)  # 3e12 + 1 is no float32
    value = place if scores is None else scores.to(torch.float64)
    value = value.clamp(-_SCORE_LIMIT, _SCORE_LIMIT)
    value = torch.where(positions >= seen - recents, _RECENT + place, value)
    if policy.window:
        value = torch.where(
            positions >= seen - policy.window, _WINDOW + place if tier >= policy.window_tier else -_RECENT, value
        )
    if policy.sinks:
        value = torch.where(positions < policy.sinks, _SINK - place if tier >= policy.sinks_tier else -_RECENT, value)
    return torch.where(positions < 0, -torch.inf, value)


def passes(policy: Policy, tier: int, positions: Tensor, seen: Tensor) -> Tensor:
    """bool, same shape: tokens that are protected in a tier below this one, and don't stay in it."""
    below = torch.zeros_like(positions, dtype=torch.bool)
    if policy.window and policy.window_tier > tier:
        below |= positions >= seen - policy.window
    if policy.sinks:
        sink = positions < policy.sinks
        below = below | sink if policy.sinks_tier > tier else below & ~sink
    return below & (positions >= 0)


def protected(policy: Policy, positions: Tensor, seen: Tensor) -> Tensor:
    """bool, same shape: tokens that importance does not decide about."""
    return ((positions < policy.sinks) | (positions >= seen - policy.window)) & (positions >= 0)


def assign(policy: Policy, scores: Tensor | None, positions: Tensor, seen: Tensor, quotas: Tensor) -> Tensor:
    """Tier of every prompt token: int8, the index of a tier, PADDING where there is no token.

    Args:
        scores: float32 [L, B, H, T], or None for a policy without importance.
        positions: int64 [L, B, H, T], negative = padding.
        seen: int64 [B], real tokens.
        quotas: cumulative, int64 [tiers - 1, L, B, H].
    """
    seen = seen[None, :, None, None]
    assigned = torch.where(positions >= 0, len(policy.tiers) - 1, PADDING)
    taken = torch.zeros(positions.shape[:3], dtype=torch.int64, device=positions.device)
    for tier, quota in enumerate(quotas):
        value = priority(policy, tier, scores, positions, seen, quotas[0][..., None])
        value = value.masked_fill((assigned >= 0) & (assigned < tier), -torch.inf)
        value = value.masked_fill(passes(policy, tier, positions, seen), -torch.inf)
        here = (ranks(value) < (quota - taken)[..., None]) & (value > -torch.inf)
        assigned = torch.where(here, tier, assigned)
        taken = taken + here.sum(dim=-1)
    last = len(policy.tiers) - 1
    if policy.tiers[last].block > 1:  # what does not fill a block stays above, the best of it
        value = priority(policy, last, scores, positions, seen, quotas[0][..., None]).masked_fill(assigned != last, -torch.inf)
        over = (assigned == last).sum(dim=-1, keepdim=True) % policy.tiers[last].block
        assigned = torch.where(ranks(value) < over, last - 1, assigned)
    return assigned.to(torch.int8)


def lowest(value: Tensor, positions: Tensor, count: int) -> Tensor:
    """Where the lowest values [..., n] are, the lowest first: int64 [..., count]; ties: the earliest token."""
    if count == 1:  # every step does this
        least = value.amin(dim=-1, keepdim=True)
        return torch.where(value == least, positions, torch.iinfo(torch.int64).max).argmin(dim=-1, keepdim=True)
    by_position = positions.argsort(dim=-1, stable=True)
    order = value.gather(-1, by_position).argsort(dim=-1, stable=True)
    return by_position.gather(-1, order)[..., :count]
