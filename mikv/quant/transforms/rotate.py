"""Rotate a vector by a Hadamard matrix, which spreads outliers over all channels: y = H x / sqrt(D).

H is symmetric and its own inverse, so that queries are rotated as keys are (H q . H k = q . k), and the weighted sum of rotated
values is rotated back once. It costs no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from mikv.quant.base import Side, Transform, Where

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Rotate(Transform):
    """No parameters."""

    order: ClassVar[int] = 3

    def check(self, head_dim: int) -> None:
        if head_dim < 2 or head_dim & (head_dim - 1):
            raise ValueError(
                f"rotate: head_dim={head_dim} is no power of two, so there is no Hadamard matrix of Sylvester's kind for it "
                "(padding would store channels that hold nothing); leave the rotation out"
            )

    def apply(self, x: Tensor, side: Side, where: Where) -> Tensor:
        return _rotated(x)

    def undo(self, y: Tensor, side: Side, where: Where) -> Tensor:
        return _rotated(y)

    def query(self, q: Tensor, side: Side) -> Tensor:
        return _rotated(q)

    def output(self, o: Tensor, weight: Tensor, side: Side) -> Tensor:
        return _rotated(o)


def _rotated(x: Tensor) -> Tensor:
    return x @ hadamard(x.shape[-1], x.device)


@lru_cache(maxsize=8)
def hadamard(size: int, device: torch.device) -> Tensor:
    """Orthonormal Hadamard matrix [size, size], float32; size is a power of two."""
    import torch

    matrix = torch.ones((1, 1), device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix / size**0.5
