"""The rivals that quantize, against slow references written from the definitions of their own code: what is read back,
what stays at 16 bits at every step, and bytes."""

from __future__ import annotations

import pytest
import torch
from conftest import engine, tokens
from torch import Tensor

from mikv.cache.compressed import CompressedCache
from mikv.cache.policy_store import PolicyStore
from mikv.config import policy
from mikv.policy import Policy
from mikv.quant.affine import dequantize, quantize
from mikv.quant.codes.codebook import centroids

SHAPE = {"layers": 6, "query_heads": 4, "kv_heads": 2, "head_dim": 64}


def compressed(one: Policy, lengths: tuple[int, ...], steps: int = 0) -> tuple[PolicyStore, Tensor, Tensor]:
    """The store after some steps, and exact keys and values [L, B, H, T, D] of the prompts alone (left-padded)."""
    run = engine(dtype=torch.float16, **SHAPE)  # minima are numbers of FP16, as in the originals
    state = run.prefill([tokens(n, seed=n) for n in lengths], one.observers)
    cache: CompressedCache = run.compress(state, [one])
    for step in range(steps):
        fed, places = torch.full((len(lengths),), step), torch.tensor(lengths) + step
        run.step(cache, fed, places, torch.ones(len(lengths), dtype=torch.bool))
    (store,) = cache.banks[0].stores
    return store, state.banks[0].keys.float(), state.banks[0].values.float()


def held(store: PolicyStore, tier: int, layer: int, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions in order, keys and values of a tier's tokens."""
    positions, used, keys, values = store.read()[tier]
    there = used[layer, row, head]
    order = positions[layer, row, head][there].argsort()
    return tuple(x[layer, row, head][there][order] for x in (positions, keys, values))  # type: ignore[return-value]


def rounded(x: Tensor, bits: int) -> Tensor:
    """One group as KIVI's code rounds it: an FP16 scale and minimum."""
    low, high = x.min(), x.max()
    scale = ((high - low) / (2**bits - 1)).half().float()
    code = ((x - low.half().float()) / scale).round().clamp(0, 2**bits - 1)
    return code * scale + low.half().float()


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_rounds_keys_per_channel_and_values_per_token(bits: int) -> None:
    lengths = (150, 133)
    store, keys, values = compressed(policy("kivi", {"bits": bits, "residual": 64}), lengths)
    for row, length in enumerate(lengths):
        coded = length - length % 64
        positions, k, v = held(store, 1, 3, row, 1)
        assert positions.tolist() == list(range(coded))
        assert held(store, 0, 3, row, 1)[0].tolist() == list(range(coded, length))
        exact_k, exact_v = (x[3, row, 1, max(lengths) - length :][:coded] for x in (keys, values))
        wanted = torch.empty_like(exact_k)
        for start in range(0, coded, 32):
            for channel in range(64):
                wanted[start : start + 32, channel] = rounded(exact_k[start : start + 32, channel], bits)
        assert torch.allclose(k, wanted, atol=1e-3 * float(exact_k.abs().max()))
        wanted = torch.stack([torch.cat([rounded(one[:32], bits), rounded(one[32:], bits)]) for one in exact_v])
        assert torch.allclose(v, wanted, atol=1e-3 * float(exact_v.abs().max()))


def test_kivi_flushes_whole_residuals() -> None:
    """Of T tokens the last T mod residual stay at 16 bits, at every step."""
    for steps in (0, 1, 31, 32, 33, 70):
        store, *_ = compressed(policy("kivi", {"residual": 32}), (50, 41), steps)
        assert store.tiers[0].count[0, :, 0].tolist() == [(50 + steps) % 32, (41 + steps) % 32]


def test_bytes_of_kivi_are_those_of_its_formula() -> None:
    """b + 32 / group bits a number, the residual at 16."""
    store, *_ = compressed(policy("kivi", {"residual": 32}), (70,))
    heads = SHAPE["layers"] * SHAPE["kv_heads"]
    bits = heads * 2 * 64 * (64 * (2 + 32 / 32) + 6 * 16)
    counted = {name: int(size) for name, size in store.nbytes().items()}
    positions = counted.pop("positions", 0)
    assert sum(counted.values()) == bits / 8
    assert positions <= 4 * heads * 6


def test_transformers_cache_codes_the_whole_prompt_and_protects_what_is_generated() -> None:
    for steps in (0, 1, 31, 32, 33):
        store, keys, _ = compressed(policy("hf_quantized", {"residual": 32}), (50, 41), steps)
        assert store.tiers[0].count[0, :, 0].tolist() == [steps % 32] * 2
    store, keys, _ = compressed(policy("hf_quantized"), (50, 41))
    exact = keys[2, 0, 1]
    wanted = torch.stack([rounded(one, 4) for one in exact])  # groups of 64 of 64 channels
    assert torch.allclose(held(store, 1, 2, 0, 1)[1], wanted, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("bits", [2, 4])
def test_coding_anew_what_was_read_changes_nothing_but_the_last_digits(bits: int) -> None:
    """Why a flush of transformers' cache, which codes everything again, needs no second coding here."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    once = dequantize(quantize(x, bits, 64))
    again = dequantize(quantize(once, bits, 64))
    error = (once - x).square().mean()
    assert (again - once).square().mean() < 1e-5 * error


@pytest.mark.parametrize(("preset", "key_bits", "value_bits"), [("4bit_nc", 4, 4), ("k3v4_nc", 3, 4), ("3bit_nc", 3, 3)])
def test_turboquant_is_what_vllm_serves(preset: str, key_bits: int, value_bits: int) -> None:
    store, keys, values = compressed(policy("turboquant", {"preset": preset}), (40,), steps=2)
    counts = [store.tiers[0].count[layer].unique().tolist() for layer in range(6)]
    assert counts == [[42], [42], [0], [0], [42], [42]]
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 64:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    hadamard /= 8
    _, k, v = held(store, 1, 2, 0, 1)
    book = torch.tensor(centroids(key_bits)) / 8  # of N(0, 1 / D)
    for token in range(40):
        key, value = keys[2, 0, 1, token], values[2, 0, 1, token]
        unit = hadamard @ key / key.norm()
        near = book[(unit[:, None] - book).abs().argmin(dim=1)]
        wanted = key.norm() * (hadamard @ (near / near.norm()))
        assert torch.allclose(k[token], wanted, atol=2e-3 * float(key.norm()))
        assert torch.allclose(v[token], rounded(value, value_bits), atol=2e-3 * float(value.abs().max()))


def test_bytes_of_turboquant() -> None:
    """Keys b D / 8 + 2 bytes, values b D / 8 + 4, in all layers but those at the ends."""
    store, *_ = compressed(policy("turboquant", {"preset": "3bit_nc", "boundary": 1}), (40,))
    counted = {name: int(size) for name, size in store.nbytes().items()}
    positions = counted.pop("positions", 0)
    assert sum(counted.values()) == 2 * 40 * (4 * (2 * 64 * 3 // 8 + 6) + 2 * 2 * 64 * 2)
    assert positions == 0
