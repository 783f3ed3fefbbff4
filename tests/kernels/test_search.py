"""The search through a trellis: the kernel gives the codes that torch does, for vectors of every kind."""

from __future__ import annotations

import pytest
import torch

from mikv.kernels.search_launch import search
from mikv.quant.codes.trellis import Trellis, cells, walk


@pytest.mark.parametrize("bits", [5, 4, 3, 2, 1])
@pytest.mark.parametrize(("count", "dim"), [(1, 16), (67, 64), (64, 128)])
def test_codes_are_those_of_torch(bits: int, count: int, dim: int) -> None:
    x = torch.randn((count, dim), generator=torch.Generator().manual_seed(bits))
    x[::5] *= 4  # beyond the last level
    x[3::7] = 0.0
    edges, within, nearest = cells(Trellis(bits).table(torch.device("cpu")))
    cell = torch.bucketize(x, edges, out_int32=True)
    assert torch.equal(search(x, cell, nearest, within), walk(x, cell, nearest, within))
    assert search(x[:0], cell[:0], nearest, within).shape == (0, dim)
