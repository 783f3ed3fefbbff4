"""KVarN's code against its definition, tile by tile, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from baselines.kvarn import kvarn
from mikv.cache.fit import counted_size
from mikv.quant.chain import chain_of
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.channel import Channel
from mikv.quant.codes.kvarn import Kvarn, balanced
from mikv.quant.tier import Tier


def vectors(*shape: int, seed: int = 0) -> Tensor:
    """Channels and tokens of very different size, some of them far off."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random)
    x = x * torch.exp(torch.randn((*shape[:-2], 1, shape[-1]), generator=random))
    x = x * torch.exp(torch.randn((*shape[:-1], 1), generator=random))
    return x + torch.randn((*shape[:-2], 1, shape[-1]), generator=random)


def slow_scales(tile: list[list[float]], rounds: int, best_of_all: bool = True) -> tuple[list[float], list[float]]:
    """Of rows and columns, in double precision, number by number; of the best state, or of the last."""
    rows, columns = len(tile), len(tile[0])
    log_rows, log_columns = [0.0] * rows, [0.0] * columns

    def state() -> list[list[float]]:
        return [[tile[r][c] / math.exp(log_columns[c]) / math.exp(log_rows[r]) for c in range(columns)] for r in range(rows)]

    def deviation(of: list[float]) -> float:
        mean = sum(of) / len(of)
        return math.sqrt(sum((x - mean) ** 2 for x in of) / (len(of) - 1))

    def deviations() -> tuple[list[float], list[float]]:
        now = state()
        return [deviation(row) for row in now], [deviation([row[c] for row in now]) for c in range(columns)]

    def spread() -> float:
        return sum(max(some) / max(min(some), 1e-8) for some in deviations())

    def added(log: float, std: float) -> float:
        return min(max(log + math.log(min(max(std, 1e-3), 1e3)), -0.3), 10.0)

    best, found = spread(), ([1.0] * rows, [1.0] * columns)
    for _ in range(rounds):
        log_columns = [added(*pair) for pair in zip(log_columns, deviations()[1], strict=True)]
        log_rows = [added(*pair) for pair in zip(log_rows, deviations()[0], strict=True)]
        if spread() <= best or not best_of_all:
            best, found = spread(), ([math.exp(x) for x in log_rows], [math.exp(x) for x in log_columns])
    return found


def slow(tile: Tensor, bits: int, by: str, rounds: int) -> Tensor:
    """What is read of a tile [g, D]."""
    numbers = tile.T.tolist() if by == "channel" else tile.tolist()
    rows, columns = slow_scales(numbers, rounds)
    read = []
    for row, scale in zip(numbers, rows, strict=True):
        x = [number / column / scale for number, column in zip(row, columns, strict=True)]
        low, step = min(x), max((max(x) - min(x)) / (2**bits - 1), 1e-10)
        s, z = (float(torch.tensor(number).half()) for number in (scale * step, scale * low))
        halves = torch.tensor(columns).half().tolist()
        read.append([(round((n - low) / step) * s + z) * t for n, t in zip(x, halves, strict=True)])
    found = torch.tensor(read)
    return found.T if by == "channel" else found


@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(("dim", "block"), [(64, 16), (16, 9)])
@pytest.mark.parametrize("rounds", [8, 1, 0])
def test_a_tile_is_read_as_the_definition_says(by: str, bits: int, dim: int, block: int, rounds: int) -> None:
    x = vectors(2, 3, 2 * block, dim)
    code = Kvarn(bits, block, by, rounds)
    back = code.decode(code.encode(x, torch.float16))
    wanted = torch.stack([slow(tile, bits, by, rounds) for tile in x.flatten(0, 1).unflatten(-2, (2, block)).flatten(0, 1)])
    wanted = wanted.view(x.shape)
    # FP32 and double: a number on the edge of two codes may fall to the other side, and FP16 scales to a neighbour
    same = torch.isclose(back, wanted, rtol=4e-3, atol=4e-3 * float(x.std()))
    assert same.float().mean() > 0.998


def test_the_state_with_the_least_spread_is_kept() -> None:
    """Where deviations are small a scale may not follow them (it is never below 0.74), and rounds make it worse again."""
    last = 0
    for seed in range(40):
        x = vectors(8, 6, seed=seed) / 2
        found = [scales.flatten().tolist() for scales in balanced(x, -1, 8)]
        for mine, wanted in zip(found, slow_scales(x.tolist(), 8), strict=True):
            assert mine == pytest.approx(wanted, rel=1e-3)
        last += slow_scales(x.tolist(), 8) == slow_scales(x.tolist(), 8, best_of_all=False)
    assert 0 < last < 30


@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2, 1])
@pytest.mark.parametrize(("dim", "block"), [(64, 128), (128, 128), (64, 64), (128, 64)])
def test_stored_bytes_are_what_the_code_says(by: str, bits: int, dim: int, block: int) -> None:
    code = Kvarn(bits, block, by)
    parts = code.encode(vectors(2, 1, 3, 2 * block, dim), torch.float16)
    numbers = 2 * 3 * 2 * block * dim
    assert sum(part.nbytes for part in parts.values()) * 8 == code.size(dim) * numbers
    own, other = (dim, block) if by == "channel" else (block, dim)
    assert code.size(dim) == bits + 16 * (2 * own + other) / (dim * block)
    assert all(part.shape[3] == (2 if name in code.per_block else 2 * block) for name, part in parts.items())
    assert code.decode(parts).shape == (2, 1, 3, 2 * block, dim)


def test_published_sizes() -> None:
    assert Kvarn(4, 128, "channel").size(128) == Kvarn(4, 128, "token").size(128) == 4.375
    assert (Kvarn(2, 128, "channel").size(64), Kvarn(2, 128, "token").size(64)) == (2.5, 2.625)


@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize("bits", [4, 2, 1])
def test_zeros_are_exact_constants_close_and_extremes_finite(by: str, bits: int) -> None:
    code = Kvarn(bits, 16, by)
    for value in (0.0, 1.5, -300.0, 1e-30, 1e30, -1e30):
        x = torch.full((1, 1, 1, 32, 64), value)
        back = code.decode(code.encode(x, torch.float16))
        assert back.isfinite().all()
        if abs(value) < 1e4:
            torch.testing.assert_close(back, x, rtol=2e-3, atol=1e-7)
    for value in (65504.0, 1e30):
        one, turning = torch.zeros(2, 1, 1, 1, 16, 64)
        one[..., 3, 5] = value
        turning[..., ::2, ::2], turning[..., 1::2, 1::2] = value, -value
        for x in (one, turning):
            assert code.decode(code.encode(x, torch.float16)).half().isfinite().all()


def test_outliers_of_tokens_and_channels_cost_the_others_little() -> None:
    """A loud token widens every channel's range; here it has a scale of its own."""
    x = torch.randn(1, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[..., 7, :] *= 50
    loud[..., 9] *= 50
    quiet = torch.ones(64, 64, dtype=torch.bool)
    quiet[7], quiet[:, 9] = False, False

    def error(code: Kvarn | Channel | Affine) -> float:
        return float((code.decode(code.encode(loud, torch.float16)) - loud)[0, 0, 0][quiet].square().mean())

    assert error(Kvarn(4, 64, "channel")) < 0.1 * error(Channel(4, 64))
    assert error(Kvarn(4, 64, "token")) < 0.1 * error(Affine(4, 64))
    assert error(Kvarn(4, 64, "channel")) < 0.1 * error(Kvarn(4, 64, "channel", rounds=0))


def test_a_tile_does_not_feel_its_neighbours() -> None:
    x = vectors(1, 1, 1, 48, 64)
    other = x.clone()
    other[..., 16:, :] *= 100
    for by in ("channel", "token"):
        code = Kvarn(3, 16, by)
        first, second = (code.decode(code.encode(one, torch.float16))[..., :16, :] for one in (x, other))
        assert torch.equal(first, second)


def test_what_is_no_code_is_refused() -> None:
    for text, message in (
        ("kvarn4/1", "at least 2 tokens"),
        ("kvarn6", "8, 5, 4, 3, 2, 1"),
        ("kvarn4/128/both", "channel or token"),
    ):
        with pytest.raises(ValueError, match=message):
            chain_of(text)
    with pytest.raises(ValueError, match="rounds=-1"):
        Kvarn(4, rounds=-1)
    with pytest.raises(ValueError, match="at least 2 channels"):
        Kvarn(4).check(1)


def test_the_policy_holds_first_tokens_and_the_unfinished_tile_at_16_bits() -> None:
    policy = kvarn("k4v2", tile=64, sinks=128)
    assert policy.tiers == (Tier(16), Tier(key=["rotate", "kvarn4/64/channel"], value=["rotate", "kvarn2/64/token"]))
    assert policy.label == "kvarn k4v2 tile=64"
    assert policy.in_order(1) == 128  # tiles need no positions
    dim, tokens = 64, 640
    full, tail = divmod(tokens - 128, 128)
    coded = 128 * full * dim * (Kvarn(4, 128, "channel").size(dim) + Kvarn(4, 128, "token").size(dim)) / 8
    exact = (128 + tail) * (4 * dim + 4)  # a position
    assert counted_size(kvarn(), dim, tokens) == pytest.approx((coded + exact) / (4 * dim * tokens))
    assert counted_size(kvarn(), dim, tokens + 127) > counted_size(kvarn(), dim, tokens + 128)
    assert counted_size(kvarn(), dim, 128) > 1  # nothing is coded, and positions are stored


def test_16_bits_and_chains_in_full_stay() -> None:
    assert kvarn(16).lossless
    own = Tier(key=["centre", "affine4"], value=4)
    assert kvarn(own, tile=32).tiers[1] == Tier(key=["centre", "affine4"], value=["rotate", "kvarn4/32/token"])
