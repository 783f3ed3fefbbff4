"""Rotary position embedding, applied to what has it already: by how many places a vector is turned. Halves are rotated into
each other (channel c with c + D / 2), as in Llama, Mistral and Qwen."""

from __future__ import annotations

import torch
from torch import Tensor


class Rope:
    """inv_freq: RoPE's inverse frequencies [D / 2]."""

    def __init__(self, inv_freq: Tensor) -> None:
        self._inv_freq = inv_freq.float()
        self._cos = self._sin = inv_freq.new_zeros((0, len(inv_freq)), dtype=torch.float32)

    def turn(self, x: Tensor, places: Tensor, most: int) -> Tensor:
        """x [..., D] turned by `places` (int64 [...], 0 to `most`), in x's dtype."""
        if len(self._cos) <= most or self._cos.device != x.device:
            angles = torch.arange(2 * most + 1, device=x.device)[:, None] * self._inv_freq.to(x.device)
            self._cos, self._sin = angles.cos(), angles.sin()
        return self._turned(x, self._cos[places], self._sin[places])

    def turn_back(self, x: Tensor, places: Tensor, most: int) -> Tensor:
        """The inverse of `turn`."""
        self.turn(x[..., :0, :], places[..., :0], most)  # the tables are long enough then
        return self._turned(x, self._cos[places], -self._sin[places])

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.float().chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
