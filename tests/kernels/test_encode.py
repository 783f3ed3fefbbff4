"""Balance, quantize and pack: the Triton kernel gives the reference's bits, and writes nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_inputs import guard_is_whole, poisoned
from torch import Tensor

from mikv.kernels import encode_launch, encode_reference
from mikv.kernels.segments import Vectors

BITS = (8, 4, 3, 2)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Vectors of many kinds, one kind per token: noise, outliers, constants, exact ties between two codes, zeros, numbers
    near the ends of FP16, tiny ones, an offset that hides the differences."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tie = torch.arange(shape[-1]) % 7 / 2
    kinds = [
        lambda t: t,
        lambda t: t.where(torch.arange(shape[-1]) % 16 != 0, 50 * t),
        lambda t: torch.full_like(t, 1.7),
        lambda t: tie.expand(t.shape) + t[..., :1].round(),
        lambda t: torch.zeros_like(t),
        lambda t: t.sign() * 65504,
        lambda t: t * 1e-6,
        lambda t: t * 0.01 + 1000.3,
    ]
    for token in range(shape[2]):
        x[:, :, token] = kinds[token % len(kinds)](x[:, :, token])
    return poisoned(x.to(dtype))


def balancer_of(rows: int, heads: int, dim: int) -> Tensor:
    return poisoned(torch.exp(torch.randn((rows, heads, dim), generator=torch.Generator().manual_seed(5))))


def assert_same(got: Vectors, wanted: Vectors) -> None:
    assert got.bits == wanted.bits
    assert got.kind == wanted.kind == "affine"
    for mine, theirs in ((got.data, wanted.data), (got.scale, wanted.scale), (got.zero, wanted.zero)):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_bits_are_those_of_the_reference(dtype: torch.dtype, bits: int, dim: int, balanced: bool) -> None:
    x = numbers((2, 2, 131, dim), dtype)
    balancer = balancer_of(2, 2, dim) if balanced else None
    assert_same(encode_launch.encode(x, bits, 2, balancer), encode_reference.encode(x, bits, 2, balancer))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_lengths_and_groups(bits: int, tokens: int, groups: int) -> None:
    """Eight groups at 4 bits: a field of the words covers two groups, the launch leaves it to the reference."""
    x = numbers((1, 2, tokens, 128), torch.float16, seed=tokens)
    assert_same(encode_launch.encode(x, bits, groups), encode_reference.encode(x, bits, groups))
    assert (encode_launch.tile_channels(bits, 128, groups) == 0) == (bits == 4 and groups == 8)


def test_many_random_quotients_are_rounded_alike() -> None:
    """Two instructions stand for a division: a hundred thousand times, with scales of every size."""
    x = torch.randn((1, 1, 800, 128), generator=torch.Generator().manual_seed(1))
    x = x * torch.exp(3 * torch.randn((1, 1, 800, 1), generator=torch.Generator().manual_seed(2)))
    for bits in (8, 3):
        assert_same(encode_launch.encode(x, bits, 2), encode_reference.encode(x, bits, 2))


@pytest.mark.parametrize("units_off", [-2, 0, 2])
def test_two_instructions_stand_for_a_division(units_off: int) -> None:
    """fma(x, a, x * b) with a + b = 1 / s is IEEE's quotient, also where a is what an approximate reciprocal gives. The
    interpreter's fma rounds twice; here it is done in float64, where it is exact enough."""
    generator = np.random.default_rng(0)
    s = generator.uniform(1, 2, 500_000).astype(np.float16).astype(np.float32)
    codes = generator.integers(0, 256, len(s)) + 0.5
    near_a_tie = np.float32(codes * s) * (1 + generator.integers(-3, 4, len(s)).astype(np.float32) * np.float32(2.0**-23))
    for x in (generator.uniform(0, 256, len(s)).astype(np.float32), near_a_tie.astype(np.float32)):
        a = (1 / s).astype(np.float32)
        a = (a.view(np.int32) + units_off).view(np.float32)
        b = np.float32(1.0 - s.astype(np.float64) * a) * a
        quotient = np.float32(x.astype(np.float64) * a + (x * b).astype(np.float64))
        assert np.array_equal(quotient, x / s)


def test_nothing_is_written_around_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers((1, 2, 70, 64), torch.float16)
    buffers: list[Tensor] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        buffers.append(poisoned(torch.zeros(shape, dtype=dtype, device=device)))
        return buffers[-1]

    monkeypatch.setattr(encode_launch.torch, "empty", empty)
    encode_launch.encode(x, 4, 2)
    assert len(buffers) == 3
    assert all(guard_is_whole(buffer) for buffer in buffers)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 2, 9, 64)
    for message, arguments in {
        "5 bits": (x, 5, 2),
        "evenly": (x, 4, 3),
        "balancer must": (x, 4, 2, torch.ones(2, 64)),
    }.items():
        with pytest.raises(ValueError, match=message):
            encode_launch.encode(*arguments)  # type: ignore[arg-type]
