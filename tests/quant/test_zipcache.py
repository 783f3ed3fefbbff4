"""ZipCache's quantizers against their definition, number by number, and the policy's cache of a prompt."""

from __future__ import annotations

import pytest
import torch
from conftest import engine, tokens
from torch import Tensor

from baselines.zipcache import zipcache
from mikv.importance.probes import Salience
from mikv.quant.base import Sample, Where
from mikv.quant.chain import Chain, chain_of
from mikv.quant.codes.affine import Affine
from mikv.quant.codes.unit import Unit
from mikv.quant.tier import Tier
from mikv.quant.transforms.scale import Scale


def vectors(tokens: int, dim: int) -> Tensor:
    """[T, D]: channels of very different size and place."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, dim, generator=random) * torch.exp(torch.randn(dim, generator=random))
    return x + 3 * torch.randn(dim, generator=random)


def slow_keys(x: Tensor, bits: int, of: Tensor | None = None) -> Tensor:
    """A minimum and a step per channel, those of other tokens where they are given."""
    ranges = [(min(channel), max(channel)) for channel in (x if of is None else of).T.tolist()]
    read = []
    for row in x.tolist():
        steps = [(high - low) / (2**bits - 1) for low, high in ranges]
        read.append([round((n - low) / s) * s + low for n, (low, _), s in zip(row, ranges, steps, strict=True)])
    return torch.tensor(read)


def slow_values(x: Tensor, bits: int, of: Tensor | None = None) -> Tensor:
    scales = [max(map(abs, channel)) ** 0.5 for channel in (x if of is None else of).T.tolist()]
    read = []
    for row in x.tolist():
        scaled = [n / s for n, s in zip(row, scales, strict=True)]
        low, step = min(scaled), (max(scaled) - min(scaled)) / (2**bits - 1)
        read.append([(round((n - low) / step) * step + low) * s for n, s in zip(scaled, scales, strict=True)])
    return torch.tensor(read)


def through(chain: Chain, x: Tensor) -> Tensor:
    """Stored and read [T, D]."""
    (step,), code = chain.transforms, chain.code
    assert code is not None
    whole = x[None, None, None]
    real = torch.ones(1, len(x), dtype=torch.bool)
    side = step.fit(Sample(whole, real, torch.arange(len(x))[None]))
    return step.undo(code.decode(code.encode(step.apply(whole, side, Where()), torch.float16)), side, Where())[0, 0, 0]


def assert_mostly_equal(mine: Tensor, wanted: Tensor) -> None:
    """Minima and steps are FP16 here: a number on the edge of two codes may fall to the other side."""
    close = torch.isclose(mine, wanted, rtol=3e-3, atol=3e-3 * float(wanted.std()))
    assert close.float().mean() > 0.99


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize(("count", "dim"), [(41, 64), (97, 128)])
def test_keys_and_values_are_read_as_the_definition_says(bits: int, count: int, dim: int) -> None:
    x = vectors(count, dim)
    for chain in (["scale/range", "unit8"], ["scale/root", "affine8/all"]):
        assert (through(chain_of(chain), x) - x).square().mean() < 2e-4 * x.var()
    assert_mostly_equal(through(chain_of(["scale/range", f"unit{bits}"]), x), slow_keys(x, bits))
    assert_mostly_equal(through(chain_of(["scale/root", f"affine{bits}/all"]), x), slow_values(x, bits))


@pytest.mark.parametrize("bits", [4, 2, 1])
@pytest.mark.parametrize("value", [0.0, 1.5, -40.0, 1e-30, 1e-7])
def test_constants_are_exact_or_as_close_as_fp16(bits: int, value: float) -> None:
    x = torch.full((7, 64), value)
    x[:, 1::2] = 0
    for chain in (["scale/range", f"unit{bits}"], ["scale/root", f"affine{bits}/all"]):
        back = through(chain_of(chain), x)
        assert back.isfinite().all()
        torch.testing.assert_close(back, x, rtol=2e-3, atol=1e-6 + 1e-4 * abs(value))


def test_extremes_are_finite_and_what_is_out_of_range_is_clipped() -> None:
    for value in (1e30, -1e30, 65504.0):
        x = vectors(9, 64)
        x[3, 5] = value
        for chain in (["scale/range", "unit2"], ["scale/root", "affine2/all"]):
            assert through(chain_of(chain), x).isfinite().all()
    outside = torch.tensor([[-0.5, 0.0, 0.4, 1.0, 7.0, 1e30, -1e30, 0.6] * 2])
    assert Unit(1).decode(Unit(1).encode(outside, torch.float16)).tolist() == [[0, 0, 0, 1, 1, 1, 0, 1] * 2]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2, 1])
def test_stored_bits_are_what_the_codes_say(dim: int, bits: int) -> None:
    x = vectors(11, dim)
    for code, size in ((Unit(bits), bits), (Affine(bits, "all"), bits + 32 / dim)):
        parts = code.encode(x, torch.float16)
        assert sum(part.nbytes for part in parts.values()) * 8 == code.size(dim) * 11 * dim
        assert code.size(dim) == size
    assert torch.equal(
        *(c.decode(c.encode(x, torch.float16)) for c in (Affine(bits, "all"), Affine(bits, dim)))  # the same numbers
    )


@pytest.mark.parametrize("count", [41, 60])
def test_the_salient_share_of_a_prompt_is_held_at_4_bits_and_the_rest_at_2(count: int) -> None:
    policy = zipcache()
    run = engine(head_dim=64)
    state = run.prefill([tokens(count)], policy.observers)
    (bank,) = state.banks
    (store,) = run.compress(state, [policy]).banks[0].stores
    (observer,) = policy.observers
    many = count * 6 // 10
    held = store.read()
    for layer in range(2):
        for head in range(bank.keys.shape[2]):
            salience = bank.observed[observer][layer, 0, head].tolist()
            salient = sorted(range(count), key=lambda i: salience[i])[count - many :]
            keys, values = bank.keys[layer, 0, head], bank.values[layer, 0, head]
            for (positions, used, k, v), bits, wanted in (
                (held[0], 16, []),
                (held[1], 4, sorted(salient)),
                (held[2], 2, sorted(set(range(count)) - set(salient))),
            ):
                there = positions[layer, 0, head][used[layer, 0, head]]
                assert there.tolist() == wanted
                if bits < 16:
                    mine = [x[layer, 0, head][: len(there)] for x in (k, v)]
                    assert_mostly_equal(mine[0], slow_keys(keys[there], bits, keys))
                    assert_mostly_equal(mine[1], slow_values(values[there], bits, values))


def test_new_tokens_wait_at_16_bits_and_are_then_ranked_with_the_salient_ones() -> None:
    policy, run = zipcache(every=10), engine()
    cache = run.compress(run.prefill([tokens(40)], policy.observers), [policy])
    (store,) = cache.banks[0].stores
    one = torch.ones(1, dtype=torch.bool)
    for step in range(1, 31):
        ranked = store.tiers[1].positions()[..., : int(store.tiers[1].count.max())].clone()
        run.step(cache, torch.tensor([step]), torch.tensor([39 + step]), one)
        counts = [int(tier.count[0, 0, 0]) for tier in store.tiers]
        coded = 40 + step // 10 * 10
        assert counts == [step % 10, coded * 6 // 10, coded - coded * 6 // 10]
        if step % 10:
            assert torch.equal(store.tiers[1].positions()[..., : counts[1]], ranked)
    low = set(store.tiers[2].positions()[0, 0, 0, : counts[2]].tolist()) if store.tiers[2].knows_positions else set()
    high = set(store.tiers[1].positions()[0, 0, 0, : counts[1]].tolist())
    assert not low & high
    assert any(position >= 40 for position in high)


def test_a_prompt_of_nothing_scales_nothing() -> None:
    x = torch.randn(1, 1, 1, 3, 16, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(1, 3, dtype=torch.bool)
    for by in ("range", "root"):
        side = Scale(by).fit(Sample(x, none, torch.arange(3)[None]))
        assert torch.equal(Scale(by).apply(x, side, Where()), x)


@pytest.mark.parametrize("by", ["range", "root"])
def test_what_does_not_count_is_as_if_it_were_not_there(by: str) -> None:
    """Also where a channel is far from zero."""
    x = 5 + vectors(12, 64)[None, None, None].abs()
    real = torch.ones(1, 12, dtype=torch.bool)
    real[:, :4] = False
    masked, cut = (Scale(by).fit(Sample(x[..., 12 - n :, :], real[:, 12 - n :], torch.arange(n)[None])) for n in (12, 8))
    assert all(torch.equal(masked[name], cut[name]) for name in cut)


def test_the_policy() -> None:
    assert zipcache(probes=0.2, per="length", seed=4).importance == Salience(0.2, "length", 4)
    assert zipcache(high=16, low=16).lossless
    assert zipcache().label == "zipcache 60% 4/2"
    assert zipcache(0.5, "k4v2", every=20, per="length").label == "zipcache 50% k4v2/2 per=length every=20"
    coded = Tier(key=["scale/range", "unit4"], value=["scale/root", "affine4/all"])
    assert zipcache().tiers[1] == coded
    assert zipcache(high=Tier(key=["balance", "affine4"], value=4)).tiers[1] == Tier(
        key=["balance", "affine4"], value=["scale/root", "affine4/all"]
    )
