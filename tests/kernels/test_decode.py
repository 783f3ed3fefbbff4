"""Decode attention over packed tiers: the Triton kernels (interpreted on the CPU), the torch reference and its faster form for
CPUs, each against a naive float64 attention over what is stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_inputs import naive, query, segment

from mikv.kernels import decode_cpu, decode_launch, decode_reference
from mikv.kernels.segments import Segment
from mikv.kernels.verify import MASS_TOLERANCE, TOLERANCE

BITS = (16, 8, 4, 3, 2)


def largest_value(s: Segment, dim: int) -> float:
    values = decode_reference.read(s.values, dim).abs()
    held = decode_reference.held(s)[..., None]
    return float(values.where(held, torch.zeros(())).max()) if values.numel() else 0.0


def check(q: torch.Tensor, segments: list[Segment], split_tokens: int = 128, scaling: float | None = None) -> None:
    """Both implementations against the naive one, within the tolerance of the query's dtype."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    wanted, wanted_mass = naive(q, segments, scaling)
    largest = max(1e-30, *(largest_value(s, q.shape[-1]) for s in segments))
    group = q.shape[1] // segments[0].keys.data.shape[1]
    results = {
        "kernel": decode_launch.decode_attention(q, segments, scaling, split_tokens),
        "reference": decode_reference.decode_attention(q, segments, scaling),
        "CPU": decode_cpu.decode_attention(q, segments, scaling),
    }
    for name, got in results.items():
        assert got.out.dtype == q.dtype
        error = float((got.out.double() - wanted).abs().max()) / largest
        assert error <= TOLERANCE[q.dtype], f"{name}: {error:.1e} of the largest value"
        for s, mine, theirs in zip(segments, got.mass, wanted_mass, strict=True):
            if not s.wants_mass:
                assert mine is None
                continue
            assert mine is not None
            assert mine.dtype == torch.float32
            error = float((mine.double() - theirs).abs().max()) if mine.numel() else 0.0
            assert error <= MASS_TOLERANCE * group, f"{name}: mass {error:.1e}"
            absent = ~decode_reference.held(s).expand(mine.shape)
            assert (mine[absent] == 0).all()


@pytest.mark.parametrize(("key_bits", "value_bits"), itertools.product(BITS, BITS))
@pytest.mark.parametrize("dim", [64, 128])
def test_every_pair_of_tiers(key_bits: int, value_bits: int, dim: int) -> None:
    """Keys and values with bits of their own; an odd length of two stretches with a whole tile and a rest."""
    check(query(1, 2, dim, torch.float16), [segment(0, 1, 1, 199, dim, key_bits, value_bits)])


@pytest.mark.parametrize("code", ["codebook", "trellis"])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 2), (5, 5), (16, 2), (3, 16)])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_levels_are_looked_up(code: str, key_bits: int, value_bits: int, dim: int) -> None:
    """Codes that stand for levels, in the same stretches as other tiers; a trellis's also by the channels before."""
    plain = segment(1, 1, 2, 37, dim, 4, 2)
    check(query(1, 6, dim, torch.float16), [segment(0, 1, 2, 199, dim, key_bits, value_bits, code=code), plain])


@pytest.mark.parametrize("code", ["trellis", None])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("wide", [True, False])
def test_logits_are_shifted_and_values_turned(code: str | None, group: int, wide: bool) -> None:
    """What a centre and a rotation leave to be done, of one tier beside others; a shift of each slot, or one for all."""
    plain, other = segment(3, 2, 2, 150, 64, 3, 2, code=code, stop=[150, 9]), segment(4, 2, 2, 40, 64, 16, 16)
    generator = torch.Generator().manual_seed(8)
    shift = 4 * torch.randn(2, 2, group, 150 if wide else 1, generator=generator)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    offset = torch.randn(2, 2, 1, 64, generator=generator)
    turned = plain._replace(shift=shift, output=lambda o, weight: o @ rotation + weight * offset, balancer=None)
    check(query(2, 2 * group, 64, torch.float16), [turned, other])
    folded = query(2, 2 * group, 64, torch.float16, seed=5).float()
    check(query(2, 2 * group, 64, torch.float16), [turned._replace(query=folded), other])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("slots", [1, 2, 15, 63, 64, 65, 128, 129])
def test_lengths(bits: int, slots: int) -> None:
    check(query(1, 1, 64, torch.float16), [segment(slots, 1, 1, slots, 64, bits, bits)])


@pytest.mark.parametrize("bits", [16, 4, 3])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 128])
def test_grouped_query_heads(bits: int, group: int, dim: int) -> None:
    check(query(2, 2 * group, dim, torch.float16), [segment(1, 2, 2, 71, dim, bits, bits)])


@pytest.mark.parametrize("channels", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [8, 3, 2])
def test_channels_per_scale(channels: int, bits: int) -> None:
    """One scale per vector up to eight; a scale may cover less than a tile of channels."""
    check(query(1, 4, 128, torch.float16), [segment(2, 1, 1, 70, 128, bits, bits, group=channels)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tiers", [((16, 16), (2, 2)), ((8, 4), (4, 2), (3, 3)), ((16, 16), (16, 2))])
def test_tiers_together(dtype: torch.dtype, tiers: tuple[tuple[int, int], ...]) -> None:
    """Any number of tiers, unequally long, in which rows hold unequally many tokens; one of them has none at all."""
    segments = [
        segment(i, 3, 2, 40 + 90 * i, 64, *bits, dtype=dtype, stop=[40 + 90 * i, 17, 0][: 3 if i else 2] + [5] * (not i))
        for i, bits in enumerate(tiers)
    ]
    check(query(3, 6, 64, dtype), segments)


@pytest.mark.parametrize("bits", [16, 2])
@pytest.mark.parametrize("stop", [[0, 1], [63, 64], [65, 130], [131, 132]])
def test_each_head_holds_as_many_as_it_holds(bits: int, stop: list[int]) -> None:
    """Slots from `stop` on hold nothing, wherever that is in a tile or a stretch; a head may hold one token, or none."""
    check(query(2, 4, 64, torch.float16), [segment(4, 2, 2, 132, 64, bits, bits, stop=[stop, stop[::-1]])])


def test_the_newest_pair_beside_the_tiers() -> None:
    """What a decode step asks for: one exact pair, a 16-bit tier with scores, a packed one without, an evicted one."""
    newest = segment(5, 2, 2, 1, 64, 16, 16)
    high = segment(6, 2, 2, 30, 64, 16, 16, stop=[30, 11])
    low = segment(7, 2, 2, 90, 64, 2, 2, stop=[90, 1], wants_mass=False)
    evicted = segment(8, 2, 2, 0, 64, 2, 2)
    check(query(2, 4, 64, torch.float16), [newest, high, low, evicted])


def test_a_row_that_holds_nothing_gives_zeros() -> None:
    q, empty = query(2, 2, 64, torch.float16), segment(9, 2, 1, 20, 64, 4, 4, stop=[0, 20])
    for implementation in (decode_launch, decode_reference, decode_cpu):
        got = implementation.decode_attention(q, [empty], 0.125)
        assert (got.out[0] == 0).all()
        assert got.out[1].isfinite().all()


@pytest.mark.parametrize("bits", [8, 3, 2])
@pytest.mark.parametrize(("key_scale", "value_scale"), [(1.0, 1e-4), (1.0, 3000.0), (1e-4, 1.0), (30.0, 1.0)])
def test_very_small_and_very_large_numbers(bits: int, key_scale: float, value_scale: float) -> None:
    """FP16 on the way: scales of values meet probabilities in it, the balanced query is folded in it. Many tokens of equal
    weight must not vanish, and nothing may overflow."""
    q = query(1, 2, 64, torch.float16, size=1 / key_scale)
    check(q, [segment(3, 1, 1, 500, 64, bits, bits, key_scale=key_scale, value_scale=value_scale)], split_tokens=512)


def test_a_query_of_zeros_attends_to_all_alike() -> None:
    q = torch.zeros(1, 2, 64, dtype=torch.float16)
    check(q, [segment(3, 1, 1, 70, 64, 2, 2)])


def test_many_stretches_are_merged() -> None:
    """More stretches than the merge takes at once."""
    check(query(1, 1, 64, torch.float16), [segment(3, 1, 1, 64 * 19, 64, 16, 16)], split_tokens=64)
