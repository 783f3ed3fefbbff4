"""The trellis code against its equation, channel by channel, and against all paths there are."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from mikv.quant.codes.codebook import Codebook
from mikv.quant.codes.trellis import Trellis, levels, read, search


def slowly(codes: list[int], table: tuple[float, ...]) -> list[float]:
    """L[4 m + 2 (p xor p_2) + p_1]."""
    path = [0, 0, *(code % 2 for code in codes)]
    return [table[4 * (code // 2) + 2 * (path[j + 2] ^ path[j]) + path[j + 1]] for j, code in enumerate(codes)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_code_is_read_as_the_equation_says(bits: int) -> None:
    codes = torch.randint(2**bits, (6, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    table = torch.tensor(levels(bits))
    for row, found in zip(codes, read(codes, table), strict=True):
        assert found.tolist() == torch.tensor(slowly(row.tolist(), levels(bits))).tolist()
    assert torch.equal(read(codes[:, :1], table)[:, 0], read(codes, table)[:, 0])  # one channel has no neighbours


@pytest.mark.parametrize(("bits", "dim"), [(1, 7), (2, 1), (2, 2), (2, 4), (3, 3)])
def test_no_path_has_less_error(bits: int, dim: int) -> None:
    """Of all codes of a vector."""
    x, table = gaussian(40, dim), torch.tensor(levels(bits))
    every = torch.tensor(list(product(range(2**bits), repeat=dim)), dtype=torch.uint8)
    least = (read(every, table)[None] - x[:, None]).square().sum(dim=-1).amin(dim=-1)
    found = (read(search(x, table), table) - x).square().sum(dim=-1)
    assert torch.allclose(found, least, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dim", "bits", "error"), [(64, 1, 0.347), (64, 2, 0.0886), (64, 3, 0.0235), (64, 4, 0.00614)])
def test_the_error_on_gaussian_vectors(dim: int, bits: int, error: float) -> None:
    """What the docstring says; and in no more bytes than a codebook's."""
    y = gaussian(4000, dim, seed=7)
    parts, plain = (code(bits).encode(y, torch.float16) for code in (Trellis, Codebook))
    found = (Trellis(bits).decode(parts) - y).square().sum() / y.square().sum()
    assert float(found) == pytest.approx(error, rel=0.03)
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == {
        name: (part.shape, part.dtype) for name, part in plain.items()
    }
    stored = sum(part[0].nbytes for part in parts.values())
    assert stored == Trellis(bits).size(dim) * dim / 8


def test_more_bits_leave_less() -> None:
    y = gaussian(2000, 128, seed=3)
    errors = [float((Trellis(b).decode(Trellis(b).encode(y, torch.float16)) - y).square().mean()) for b in range(1, 6)]
    assert all(b < a / 3 for a, b in pairwise(errors))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_levels_rise_are_symmetric_and_the_mean_of_what_chooses_them(bits: int) -> None:
    table = torch.tensor(levels(bits))
    assert len(table) == 2 ** (bits + 1)
    assert (table.diff() > 0).all()
    assert torch.equal(table, -table.flip(0))
    y = gaussian(6000, 128, seed=11)
    unit = y * (128**0.5 / y.norm(dim=-1, keepdim=True))
    chosen = read(search(unit, table), torch.arange(len(table))).flatten()
    mean = torch.zeros(len(table)).index_add_(0, chosen, unit.flatten()) / torch.bincount(chosen)
    assert torch.allclose(mean, table, atol=0.01 if bits < 5 else 0.05)  # the outermost are chosen seldom


def test_vectors_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once, in pieces, or one by one; zeros and large numbers stay what they are."""
    from mikv.quant.codes import trellis

    y = gaussian(2, 3, 1, 9, 32, seed=5)
    y[0, 0, 0, 4] = 0
    y[1, 1, 0, 2] *= 1e4
    whole = Trellis(2).encode(y, torch.float16)
    monkeypatch.setitem(trellis._AT_ONCE, "cpu", 5)
    pieces = Trellis(2).encode(y, torch.float16)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    one = Trellis(2).encode(y[1, 2, :, 8:], torch.float16)
    assert all(torch.equal(whole[name][1, 2, :, 8:], one[name]) for name in one)
    found = Trellis(2).decode(whole)
    assert (found[0, 0, 0, 4] == 0).all()
    assert torch.allclose(found.norm(dim=-1), y.norm(dim=-1), rtol=2e-3)  # the norm is kept
    assert Trellis(2).encode(y[:, :0], torch.float16)["norm"].shape == (2, 0, 1, 9, 1)


def test_bits_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="trellis codes have 5, 4, 3, 2, 1 bits"):
        Trellis(6)
