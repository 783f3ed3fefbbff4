"""The two attention functions against a naive one that writes every matrix out, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mikv.attention import reference
from mikv.attention.fused import fused_causal_attention
from mikv.attention.reference import causal_attention, decode_attention

# fp32: rounding of a few hundred additions; 16 bits: the inputs' own rounding
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def naive(query: Tensor, key: Tensor, value: Tensor, scaling: float, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, Tq, Hq, D] and probabilities [B, Hq, Tq, T], head by head, in float64. allowed: bool [B, H, Tq, T]."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, queries, heads, query.shape[-1], dtype=torch.float64)
    probs = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            k, v = key[b, h // group].double(), value[b, h // group].double()
            scores = (query[b, h].double() @ k.T * scaling).masked_fill(~allowed[b, h // group], -torch.inf)
            probs[b, h] = scores.softmax(-1).nan_to_num(0.0)  # a query that may see nothing
            out[b, :, h] = probs[b, h] @ v
    return out, probs


def inputs(tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads[0], tokens, dim), (batch, heads[1], tokens, dim), (batch, heads[1], tokens, dim))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 300])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((9, 3), 64), ((4, 1), 128), ((8, 1), 64)])
def test_causal_attention_in_blocks(dtype: torch.dtype, tokens: int, heads: tuple[int, int], dim: int) -> None:
    q, k, v = inputs(tokens, heads, dim, dtype)
    padding = torch.ones(2, tokens, dtype=torch.bool)
    padding[1, : tokens // 3] = False
    allowed = torch.ones(tokens, tokens).tril().bool() & padding[:, None, None, :]
    sums = torch.zeros(2, heads[1], tokens)

    def watch(probs: Tensor, first: int) -> None:
        real = padding[:, None, None, first : first + probs.shape[3], None]
        sums[..., : probs.shape[-1]] += (probs * real).sum(dim=(2, 3))

    got = causal_attention(q, k, v, dim**-0.5, padding, watch)
    out, probs = naive(q, k, v, dim**-0.5, allowed.expand(2, heads[1], tokens, tokens))
    assert got.isfinite().all()
    assert (got.double() - out)[padding].abs().max() <= TOLERANCE[dtype]
    # column sums from blocks == the full matrix, summed over real queries and the group
    wanted = (probs * padding[:, None, :, None]).unflatten(1, (heads[1], -1)).sum(dim=(2, 3))
    assert (sums - wanted).abs().max() <= TOLERANCE[dtype] * tokens


def test_scores_are_those_of_the_stock_model() -> None:
    """Accumulated importance == the sum of the attention matrices that transformers itself returns (trap T19)."""
    from conftest import engine, model, tokens

    from mikv.importance.scores import Accumulated

    run, ids = engine(), tokens(150)
    state = run.prefill([ids], {Accumulated().observer})
    with torch.inference_mode():
        attentions = model("llama", torch.float32, "eager")(torch.tensor([ids]), output_attentions=True).attentions
    group = run.geometry.query_heads // run.geometry.kv_heads
    for layer, probs in enumerate(attentions):
        wanted = probs[0].unflatten(0, (-1, group)).sum(dim=(1, 2))
        assert torch.allclose(state.banks[0].observed[Accumulated().observer][layer, 0], wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("slots", [1, 5, 77])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((9, 3), 64), ((4, 1), 128), ((8, 1), 64)])
def test_decode_attention(dtype: torch.dtype, slots: int, heads: tuple[int, int], dim: int) -> None:
    _, k, v = inputs(slots, heads, dim, dtype)
    q = torch.randn(2, heads[0], 1, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    present = torch.rand(2, heads[1], slots, generator=torch.Generator().manual_seed(2)) < 0.6
    present[..., -1] = True
    out, mass = decode_attention(q, k, v, present, dim**-0.5)
    wanted, probs = naive(q, k, v, dim**-0.5, present[:, :, None])
    assert (out.double() - wanted).abs().max() <= TOLERANCE[dtype]
    assert (mass - probs.unflatten(1, (heads[1], -1)).sum(dim=(2, 3))).abs().max() <= TOLERANCE[dtype] * heads[0]
    assert (mass[~present] == 0).all()


def test_what_is_absent_may_hold_anything_finite() -> None:
    """A reused working copy holds leftovers in absent columns: they must not shine through."""
    _, k, v = inputs(9, (4, 2), 64, torch.float32)
    q = torch.randn(2, 4, 1, 64)
    present = torch.ones(2, 2, 9, dtype=torch.bool)
    present[:, :, 3:6] = False
    clean = decode_attention(q, k, v, present, 0.125)
    k[:, :, 3:6], v[:, :, 3:6] = 1e6, -1e6
    assert all(torch.equal(a, b) for a, b in zip(clean, decode_attention(q, k, v, present, 0.125), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 40), (7, 7), (256, 256), (257, 300), (300, 300), (90, 400)])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((9, 3), 64), ((4, 1), 128), ((8, 1), 64)])
@pytest.mark.parametrize("padded", [False, True])
def test_both_causal_attentions_agree_also_for_the_last_queries_only(
    dtype: torch.dtype, queries: int, tokens: int, heads: tuple[int, int], dim: int, padded: bool
) -> None:
    """With a shared prefix the queries are the last of the columns; padding may reach into them."""
    q, k, v = inputs(tokens, heads, dim, dtype)
    q = q[:, :, -queries:]
    padding = torch.ones(2, tokens, dtype=torch.bool)
    if padded:
        padding[1, : tokens - queries + queries // 3] = False
    mask = padding if padded else None
    causal = torch.ones(tokens, tokens).tril().bool()[-queries:]
    out, _ = naive(q, k, v, dim**-0.5, (causal & padding[:, None, None, :]).expand(2, heads[1], queries, tokens))
    real = padding[:, -queries:]
    for attention in (causal_attention, fused_causal_attention):
        got = attention(q, k, v, dim**-0.5, mask)
        assert got.shape == (2, queries, heads[0], dim)
        assert got.isfinite().all()
        assert (got.double() - out)[real].abs().max() <= TOLERANCE[dtype]


def test_memory_of_prefill_attention_is_linear() -> None:
    """No T x T matrix: the largest block of probabilities has QUERY_BLOCK rows."""
    q, k, v = inputs(1000, (2, 1), 16, torch.float32, batch=1)
    seen: list[torch.Size] = []
    causal_attention(q, k, v, 0.25, watch=lambda probs, _: seen.append(probs.shape))
    assert max(shape[3] for shape in seen) == reference.QUERY_BLOCK
    assert len(seen) == 8


def test_the_model_without_a_cache_of_ours_is_the_stock_model() -> None:
    """The registered attention is also called with plain tensors, and with padding only."""
    from conftest import model, tokens

    ids = torch.tensor([[257] * 5 + tokens(20), tokens(25, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.inference_mode():
        mine = model()(ids, attention_mask=mask).logits
        stock = model("llama", torch.float32, "eager")(ids, attention_mask=mask).logits
    assert torch.allclose(mine[mask.bool()], stock[mask.bool()], atol=1e-4)
