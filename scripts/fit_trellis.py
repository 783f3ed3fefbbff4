"""Computes the levels of mikv/quant/codes/trellis.py, and relative errors of codes on Gaussian vectors.

    python scripts/fit_trellis.py             # the levels
    python scripts/fit_trellis.py --errors    # the errors that docs/lab_book.md gives, grids of 2 and 8 dimensions beside

Lloyd's iteration on Gaussian vectors, as long as a code takes them to be: the best paths for some levels, then each level the
mean of what chose it. Means are taken over both signs, for the levels are symmetric.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

import torch
from torch import Tensor
from tqdm import tqdm

from mikv.quant.codes.codebook import Codebook, Levels, centroids, norm_per_vector
from mikv.quant.codes.trellis import Trellis, read, search

VECTORS, DIM, ROUNDS = 8000, 128, 100


def fitted(bits: int) -> list[float]:
    """The positive levels."""
    x = norm_per_vector(gaussian(VECTORS, DIM, 0))[1]
    table = torch.tensor(centroids(bits + 1))
    for _ in tqdm(range(ROUNDS), desc=f"{bits} bits"):
        table = means(x, table)
    return [round(level, 4) for level in table.tolist()[2**bits :]]


def means(x: Tensor, table: Tensor) -> Tensor:
    """Of the numbers that chose a level, symmetric."""
    chosen = torch.cat([read(search(some, table), torch.arange(len(table))) for some in x.split(4000)]).flatten()
    total = torch.zeros_like(table).index_add_(0, chosen, x.flatten())
    count = torch.bincount(chosen, minlength=len(table))
    return (total - total.flip(0)) / (count + count.flip(0)).clamp(min=1)


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def error(code: Levels, dim: int) -> float:
    """E |y^ - y|^2 / E |y|^2."""
    y = gaussian(20000, dim, 1)
    return relative(code.decode(code.encode(y, torch.float16)), y)


def grid_error(points: int, size: int, signs: bool, dim: int = 64) -> float:
    """The same of a grid of so many points in `size` dimensions (k-means), and a sign for each channel where signs."""
    x = gaussian(100000, size, 2)
    x = x.abs() if signs else x
    grid = x[:points].clone()
    for _ in tqdm(range(40), desc=f"{points} points, {size} dimensions"):
        near = nearest(x, grid)
        count = torch.bincount(near, minlength=points).clamp(min=1)
        grid = torch.zeros_like(grid).index_add_(0, near, x) / count[:, None]
    y = gaussian(4000, dim, 1)
    norm, unit = norm_per_vector(y)
    pieces = unit.view(-1, size)
    found = grid[nearest(pieces.abs() if signs else pieces, grid)]
    found = (found * pieces.sign() if signs else found).view(y.shape)
    return relative(found * norm / found.norm(dim=-1, keepdim=True), y)


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    return torch.cat([torch.cdist(some, grid).argmin(dim=-1) for some in x.split(20000)])


def relative(found: Tensor, y: Tensor) -> float:
    return float((found - y).square().sum() / y.square().sum())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="relative errors in the place of the levels")
    if not parser.parse_args().errors:
        for bits in range(1, 6):
            print(f"{bits}: {tuple(fitted(bits))},")
        return
    for dim in (64, 128):
        for bits in range(1, 6):
            print(f"D = {dim}, {bits} bits: codebook {error(Codebook(bits), dim):.4f}, trellis {error(Trellis(bits), dim):.4f}")
    print(f"2 bits, 16 points in 2 dimensions {grid_error(16, 2, False):.4f}")
    print(f"2 bits, signs and 256 points in 8 dimensions {grid_error(256, 8, True):.4f}")


if __name__ == "__main__":
    main()
