"""Positions inside the cache, for the policies that want them (positions=contiguous, as StreamingLLM).

With n tokens evicted after a key, a re-indexed cache shows it n places nearer to the query than its own position says.
Rotating the stored key (RoPE already applied) by n more places does just that, and only relative places matter.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Reindex:
    """Rotates stored keys. inv_freq: RoPE's inverse frequencies [D / 2]."""

    def __init__(self, inv_freq: Tensor) -> None:
        self._inv_freq = inv_freq.float()
        self._cos = self._sin = inv_freq.new_zeros((0, len(inv_freq)), dtype=torch.float32)

    def __call__(self, keys: Tensor, gone: Tensor, columns: int) -> Tensor:
        """keys [B, H, S, D], after each of which gone (int64 [B, H, S], 0 to `columns`) tokens are missing -> rotated keys."""
        if len(self._cos) <= columns:
            angles = torch.arange(2 * columns + 1, device=keys.device)[:, None] * self._inv_freq.to(keys.device)
            self._cos, self._sin = angles.cos(), angles.sin()
        cos, sin = self._cos[gone], self._sin[gone]
        left, right = keys.float().chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(keys.dtype)


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

    positions: int64 [..., B, H, S], those of the tokens that are held; used: bool [B, S]; seen: int64 [B], tokens seen so far.
    """
    used, seen = (x.to(positions.device) for x in (used, seen))
    held = used[:, None].expand(positions.shape)
    later = torch.where(held, positions, -1).argsort(dim=-1, descending=True).argsort(dim=-1)  # held ones that come later
    return torch.where(held, seen[:, None, None] - 1 - positions - later, 0)
