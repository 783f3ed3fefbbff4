"""Packing: the docstring's worked example, round trips, and that the bytes are those that are claimed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mikv.quant.packing import PACKED_BITS, pack, unpack

DIMS = (16, 64, 80, 96, 128)


def codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def words_of(packed: Tensor) -> list[int]:
    """int16 words as the unsigned numbers of the docstring."""
    return [word & 0xFFFF for word in packed.tolist()]


def test_worked_example_of_the_docstring() -> None:
    assert words_of(pack(torch.arange(16, dtype=torch.uint8), 4)) == [0xC840, 0xD951, 0xEA62, 0xFB73]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    """Channel c holds code c % 8: low bits in D / 8 words, then the high bit in D / 16 words."""
    low0, low1, high = words_of(pack(torch.arange(16, dtype=torch.uint8) % 8, 3))
    even, odd = range(0, 16, 2), range(1, 16, 2)  # two words: word w holds channels w, w + 2, ...
    assert low0 == sum((c % 4) << (2 * i) for i, c in enumerate(even))
    assert low1 == sum((c % 4) << (2 * i) for i, c in enumerate(odd))
    assert high == sum(((c % 8) >> 2) << c for c in range(16))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 1, 5), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_round_trip_and_bytes(bits: int, dim: int, shape: tuple[int, ...]) -> None:
    original = codes(*shape, dim, bits=bits)
    packed = pack(original, bits)
    back = unpack(packed, bits, dim)
    assert back.dtype == torch.uint8
    assert torch.equal(back, original)
    assert packed.shape[:-1] == shape
    assert packed.shape[-1] * packed.element_size() * 8 == dim * bits


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_the_largest_code_everywhere_survives_the_sign_bit(bits: int) -> None:
    full = torch.full((3, 32), 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(full, bits), bits, 32), full)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_packing_leaves_its_input_alone(bits: int) -> None:
    original = codes(4, 32, bits=bits)
    before = original.clone()
    pack(original, bits)
    assert torch.equal(original, before)


@pytest.mark.parametrize("bits", [0, 6, 7, 16])
def test_other_bits_are_refused_with_the_choices(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"{bits}-bit codes can't be packed.*8, 5, 4, 3, 2, 1"):
        pack(torch.zeros(16, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"{bits}-bit codes"):
        unpack(torch.zeros(16, dtype=torch.int16), bits, 16)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("dim", [8, 20, 100])
def test_a_head_that_fills_no_whole_words_is_refused(dim: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim={dim} is no multiple of 16"):
        pack(torch.zeros(dim, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"head_dim={dim} is no multiple of 16"):
        unpack(torch.zeros(dim, dtype=torch.int16), bits, dim)
