"""Positions inside the cache, for the policies that want them (positions=contiguous, as StreamingLLM).

With n tokens evicted after a key, a re-indexed cache shows it n places nearer to the query than its own position says.
Rotating the stored key (RoPE already applied) by n more places (mikv/rope.py) does just that, and only relative places matter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gone_after_columns(present: Tensor, padding: Tensor) -> Tensor:
    """How many tokens are missing after each column of a dense cache, int64 [B, H, S].

    present: bool [B, H, S]; padding: int64 [B], columns at the left that never held one.
    """
    columns = torch.arange(present.shape[2], device=present.device)
    real = (columns >= padding.to(present.device)[:, None])[:, None]
    gone = (real & ~present).long()
    return gone.sum(-1, keepdim=True) - gone.cumsum(-1)


def gone_after_slots(positions: Tensor, used: Tensor, seen: Tensor) -> Tensor:
    """The same of slots in any order, int64 [..., B, H, S]; 0 for unused ones.

    positions: int64 [..., B, H, S], those of the tokens that are held; used: bool, broadcasts to them; seen: int64 [B], tokens
    seen so far.
    """
    used, seen = (x.to(positions.device) for x in (used, seen))
    held = used.expand(positions.shape)
    later = torch.where(held, positions, -1).argsort(dim=-1, descending=True).argsort(dim=-1)  # held ones that come later
    return torch.where(held, seen[:, None, None] - 1 - positions - later, 0)
