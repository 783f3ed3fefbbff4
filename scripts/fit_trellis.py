"""Computes the levels of mikv/quant/codes/trellis.py, and the relative errors that its docstring gives.

python -m scripts.fit_trellis

Lloyd's iteration on Gaussian vectors, as long as a code takes them to be: the best paths for some levels, then each level the
mean of what chose it. Means are taken over both signs, for the levels are symmetric.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from mikv.quant.base import Code
from mikv.quant.codes.codebook import Codebook, centroids, norm_per_vector
from mikv.quant.codes.trellis import Trellis, read, search

VECTORS, DIM, ROUNDS = 8000, 128, 100


def fitted(bits: int) -> list[float]:
    """The positive levels."""
    x = norm_per_vector(torch.randn(VECTORS, DIM, generator=torch.Generator().manual_seed(0)))[1]
    table = torch.tensor(centroids(bits + 1))
    for _ in tqdm(range(ROUNDS), desc=f"{bits} bits"):
        table = means(x, table)
    return [round(level, 4) for level in table.tolist()[2**bits :]]


def means(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Of the numbers that chose a level, symmetric."""
    chosen = torch.cat([read(search(some, table), torch.arange(len(table))) for some in x.split(4000)]).flatten()
    total = torch.zeros_like(table).index_add_(0, chosen, x.flatten())
    count = torch.bincount(chosen, minlength=len(table))
    return (total - total.flip(0)) / (count + count.flip(0)).clamp(min=1)


def error(code: Code, dim: int = 64) -> float:
    """E |y^ - y|^2 / E |y|^2 of Gaussian vectors."""
    y = torch.randn(20000, dim, generator=torch.Generator().manual_seed(1))
    return float((code.decode(code.encode(y, torch.float16)) - y).square().sum() / y.square().sum())


if __name__ == "__main__":
    for bits in range(1, 6):
        print(f"{bits}: {tuple(fitted(bits))},")
    for bits in range(1, 6):
        print(f"{bits} bits: codebook {error(Codebook(bits)):.4f}, trellis {error(Trellis(bits)):.4f}")
