"""The quantizer against a slow reference that goes group by group, and what it must survive (traps T13, T14, T16)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mikv.quant.affine import FP16_MAX, MIN_SCALE, Quantized, dequantize, quantize

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(x: Tensor, bits: int, group: int) -> Quantized:
    """One group at a time: fit to the FP16 grid that is stored, round half to even (Python's round)."""
    levels = 2**bits - 1
    codes, scales, zeros = [], [], []
    for vector in x.float().reshape(-1, x.shape[-1]).numpy():
        for start in range(0, len(vector), group):
            values = [np.float32(min(max(v, -FP16_MAX), FP16_MAX)) for v in vector[start : start + group]]
            zero = np.float16(min(values))
            step = np.float16((max(values) - np.float32(zero)) / np.float32(levels))
            scale = max(step, np.float16(2.0**-24))
            zeros.append(zero)
            scales.append(scale)
            codes += [min(max(round((v - np.float32(zero)) / np.float32(scale)), 0), levels) for v in values]
    groups = (*x.shape[:-1], x.shape[-1] // group)
    return Quantized(
        torch.tensor(codes, dtype=torch.uint8).reshape(x.shape),
        torch.from_numpy(np.array(scales, dtype=np.float16)).reshape(groups),
        torch.from_numpy(np.array(zeros, dtype=np.float16)).reshape(groups),
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got: Quantized, wanted: Quantized) -> None:
    for name, mine, theirs in zip(Quantized._fields, got, wanted, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name


def bound(x: Tensor, q: Quantized, bits: int) -> Tensor:
    """Largest error [..., D]: half a step, what the minimum lost in FP16, and what a subnormal scale lost at all its levels."""
    group = x.shape[-1] // q.scale.shape[-1]
    low = x.float().unflatten(-1, (-1, group)).amin(dim=-1)
    subnormal = (q.scale < 2.0**-14) * (2**bits - 1) * MIN_SCALE / 2
    per_group = q.scale.float() / 2 + (low - q.zero.float()).abs() + subnormal
    return per_group.repeat_interleave(group, dim=-1) + 2e-7 * x.float().abs()  # float32's own rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [8, 32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_scale_and_minimum_is_the_slow_references(bits: int, group: int, dtype: torch.dtype) -> None:
    x = (normal(2, 3, 2 * group) * torch.tensor([0.01, 1.0, 100.0]).view(1, 3, 1) + 0.3).to(dtype)
    assert_same(quantize(x, bits, group), reference(x, bits, group))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (3, 1, 5), (2, 1, 1, 7), (0,), (2, 0)])
def test_any_leading_shape_one_token_and_none(shape: tuple[int, ...]) -> None:
    x = normal(*shape, 32)
    q = quantize(x, 3, 16)
    assert q.codes.shape == x.shape
    assert q.scale.shape == q.zero.shape == (*shape, 2)
    assert_same(q, reference(x, 3, 16))
    assert dequantize(q).shape == x.shape


def test_halves_round_to_the_even_code() -> None:
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 3.0])  # scale 1 at 2 bits
    assert quantize(x, 2, 8).codes.tolist() == [0, 0, 2, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.0, -0.0, 1.0, -3.25, 2.0**-14, -(2.0**15), 0.0999755859375])
def test_a_constant_group_is_exact(constant: float, dtype: torch.dtype, bits: int) -> None:
    """T16: max == min must not divide by zero; padding makes such groups. For constants that FP16 can hold."""
    x = torch.full((3, 16), constant, dtype=dtype)
    q = quantize(x, bits, 8)
    x_hat = dequantize(q)
    assert torch.equal(x_hat, x.float())
    assert not q.codes.any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [2.0**-24, 2.0**-25, 2.0**-30, 1e-6, 1e-40])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_subnormal_range_has_a_scale_and_a_bounded_error(offset: float, size: float, bits: int) -> None:
    x = offset + size * normal(4, 16)
    q = quantize(x, bits, 8)
    assert (q.scale >= MIN_SCALE).all()
    assert_same(q, reference(x, bits, 8))
    assert ((x - dequantize(q)).abs() <= bound(x, q, bits)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("values", [(1e38, -1e38), (7e4, 1.0), (-7e4, 0.0), (65504.0, -65504.0), (float("inf"), 0.0)])
def test_huge_values_saturate_and_never_give_nan_or_infinity(values: tuple[float, float], bits: int) -> None:
    x = torch.tensor([values[i % 2] for i in range(8)])
    q = quantize(x, bits, 8)
    x_hat = dequantize(q)
    assert all(part.isfinite().all() for part in (q.scale, q.zero, x_hat))
    wanted = x.clamp(-FP16_MAX, FP16_MAX)
    assert ((x_hat - wanted).abs() <= q.scale.float() / 2).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_is_read_back_of_the_widest_range_is_still_finite_in_fp16(bits: int) -> None:
    """The dense working copy of an FP16 model casts what is read back; the rounded-up scale must not carry it to infinity."""
    x = torch.tensor([FP16_MAX, -FP16_MAX] * 4, dtype=torch.float16)
    assert dequantize(quantize(x, bits, 8)).to(torch.float16).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (1.0, 50.0), (1e-3, 1.0), (1e-3, -200.0), (1e4, 0.0), (1e-5, 0.0)])
def test_error_is_half_a_step_and_the_rounding_of_the_minimum(
    size: float, offset: float, bits: int, dtype: torch.dtype
) -> None:
    x = (size * normal(64, 64) + offset).to(dtype)
    q = quantize(x, bits, 32)
    assert ((x.float() - dequantize(q)).abs() <= bound(x, q, bits)).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_group_never_leaves_its_row_head_and_token(bits: int) -> None:
    """T14: codes of a vector are the same alone and among others, whatever their size."""
    rows, heads, tokens, dim = 3, 2, 5, 32
    x = normal(rows, heads, tokens, dim) * torch.logspace(-3, 3, rows * heads * tokens).view(rows, heads, tokens, 1)
    together = quantize(x, bits, 16)
    for row, head, token in np.ndindex(rows, heads, tokens):
        assert_same(Quantized(*(part[row, head, token] for part in together)), quantize(x[row, head, token], bits, 16))
    other_mates = x.clone()
    other_mates[1:] *= 1e4
    assert_same(Quantized(*(part[0] for part in quantize(other_mates, bits, 16))), Quantized(*(p[0] for p in together)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("bits", BITS)
def test_quantizing_what_was_read_back_changes_nothing(bits: int, group: int, dtype: torch.dtype) -> None:
    """T13: no drift. The read value lies on the stored grid, so a second pass finds the same grid and codes."""
    x = (3 * normal(200, 64)).to(dtype)
    once = quantize(x, bits, group)
    assert_same(quantize(dequantize(once), bits, group), once)


def test_an_offset_beyond_fp16_precision_drifts_by_no_more_than_each_passs_own_bound() -> None:
    """Minimum 1000 with a range of 0.1: FP16 cannot hold the minimum, the grid of the second pass may be another one."""
    x = 1000.0 + 0.1 * normal(200, 32)
    once = quantize(x, 4, 16)
    x_hat = dequantize(once)
    twice = quantize(x_hat, 4, 16)
    assert ((dequantize(twice) - x_hat).abs() <= bound(x_hat, twice, 4)).all()


@pytest.mark.parametrize(("first", "then"), [*pairwise((8, 4, 3, 2)), (8, 2)])
def test_a_demoted_code_adds_one_error_of_the_lower_tier(first: int, then: int) -> None:
    """A token leaving a quantized tier is quantized from what that tier still knows: two errors, not more."""
    x = 2 * normal(200, 32)
    high = quantize(x, first, 16)
    known = dequantize(high)
    low = quantize(known, then, 16)
    error = (x - dequantize(low)).abs()
    assert (error <= bound(x, high, first) + bound(known, low, then)).all()
