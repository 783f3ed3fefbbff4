"""One norm per vector and a fixed codebook: what a rotation leaves looks Gaussian, so the best scalar codebook of N(0, 1) fits.

    n = |y|      code_j = nearest centroid to sqrt(D) y_j / n      y_hat = n c / |c|,  c_j = centroid[code_j]

n / |c| is what is stored, in FP16: the vector that is read has the norm of the one that was written ("norm correction"). A
scale and a minimum per half vector cost half of a 2-bit cache; one norm costs a quarter bit per number at D = 64.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from mikv.quant.base import Code, Parts
from mikv.quant.codes.affine import check_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LIMIT = 65504.0  # of FP16
_ITERATIONS = 5000  # until centroids move by less than FP32 can tell, at 5 bits too


class Levels(Code):
    """Codes of 1 to 5 bits that stand for levels of a fixed table, and one norm per vector. To be inherited from."""

    @property
    @abstractmethod
    def known(self) -> tuple[float, ...]:
        """The table for N(0, 1), rising."""

    @abstractmethod
    def choose(self, unit: Tensor, table: Tensor) -> Tensor:
        """Codes uint8 [..., D] of vectors float32 [..., D] of length sqrt(D)."""

    @abstractmethod
    def read(self, codes: Tensor, table: Tensor) -> Tensor:
        """Levels float32 [..., D] of codes uint8 [..., D]."""

    def encode(self, y: Tensor, storage: torch.dtype) -> Parts:
        """{"codes": [..., *], "norm": FP16 [..., 1]}; a vector of zeros is exact."""
        from mikv.quant.packing import pack

        norm, unit = norm_per_vector(y)
        table = self.table(y.device)
        codes = self.choose(unit, table)
        return {"codes": pack(codes, self.bits), "norm": _stored(norm, self.read(codes, table))}

    def decode(self, parts: Parts) -> Tensor:
        from mikv.quant.packing import unpack, unpacked_dim

        codes = unpack(parts["codes"], self.bits, unpacked_dim(parts["codes"], self.bits))
        return self.read(codes, self.table(codes.device)).mul_(parts["norm"].float())

    def size(self, head_dim: int) -> float:
        return self.bits + 16 / head_dim

    def table(self, device: torch.device, half: bool = False) -> Tensor:
        """`known` as float32, or FP16."""
        return _on_device(self.known, device, half)


@dataclass(frozen=True)
class Codebook(Levels):
    """bits: 1 to 5."""

    bits: int

    def __post_init__(self) -> None:
        check_bits("codebook", self.bits, (5, 4, 3, 2, 1))

    @property
    def known(self) -> tuple[float, ...]:
        return centroids(self.bits)

    def choose(self, unit: Tensor, table: Tensor) -> Tensor:
        import torch

        return torch.bucketize(unit, (table[1:] + table[:-1]) / 2).to(torch.uint8)

    def read(self, codes: Tensor, table: Tensor) -> Tensor:
        return table[codes.int()]


@cache
def _on_device(levels: tuple[float, ...], device: torch.device, half: bool) -> Tensor:
    """float32 or FP16. Once: a step must not wait for a copy to a GPU."""
    import torch

    return torch.tensor(levels, device=device, dtype=torch.float16 if half else torch.float32)


def norm_per_vector(y: Tensor) -> tuple[Tensor, Tensor]:
    """|y| and sqrt(D) y / |y|, float32 [..., 1] and [..., D]."""
    import torch

    y = y.float()
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return norm, y * (y.shape[-1] ** 0.5 / norm.clamp(min=torch.finfo(torch.float32).tiny))


def _stored(norm: Tensor, levels: Tensor) -> Tensor:
    """n / |c| in FP16, [..., 1]. levels: c, [..., D]."""
    import torch

    return (norm / torch.linalg.vector_norm(levels, dim=-1, keepdim=True)).clamp(max=_LIMIT).half()


@cache
def centroids(bits: int) -> tuple[float, ...]:
    """The 2^bits centroids of N(0, 1) with the least mean square error (Lloyd, Max), rising."""
    half = [(i + 0.5) * 4 / 2**bits for i in range(2 ** (bits - 1))]  # symmetric: the positive ones
    for _ in range(_ITERATIONS):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(half)), math.inf]
        half = [
            (_density(a) - _density(b)) / (_below(b) - _below(a)) for a, b in pairwise(edges)
        ]  # the mean of N(0, 1) between two edges
    return (*(-c for c in reversed(half)), *half)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
