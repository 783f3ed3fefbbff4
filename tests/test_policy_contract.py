"""What must be true of every policy, found by listing conf/policy and tests/strangers: the identities and traps of
shared/reading/pitfalls.md.

A new policy is tested here without touching this file: what it must hold is asked of the policy (tiers, budget, codes).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import NO_END, POLICIES, STRANGERS, answers, bits_everywhere, engine, model, named_policy, prompt, tokens
from rounding import assert_answers_alike

from mikv.budget import Amounts, Residual
from mikv.cache.compressed import CompressedCache
from mikv.cache.tier_store import TierStore
from mikv.config import options_of_policy, policy
from mikv.engine import Engine
from mikv.engine.requests import Decoding, Prompt
from mikv.importance.base import Observer
from mikv.policy import Policy

LENGTHS = (41, 17, 30, 2)  # odd, short, even, and one token of context


def stock_answer(architecture: str, dtype: torch.dtype, ids: list[int], steps: int, **shape: Any) -> list[int]:
    """Greedy answer of transformers' own cache and attention, the last prompt token decoded, as the engine does it."""
    from transformers import DynamicCache

    stock = model(architecture, dtype, "eager", **shape)
    past = DynamicCache(config=stock.config)
    with torch.inference_mode():
        if len(ids) > 1:
            stock(torch.tensor([ids[:-1]]), past_key_values=past)
        answer: list[int] = []
        for _ in range(steps):
            fed = answer[-1] if answer else ids[-1]
            answer.append(int(stock(torch.tensor([[fed]]), past_key_values=past).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_16_bits_everywhere_is_the_stock_cache_token_for_token(name: str, dtype: torch.dtype) -> None:
    lossless = bits_everywhere(name, 16)
    assert lossless.lossless or lossless.evicts
    mine = answers(engine(dtype=dtype), [prompt(41, seed=s) for s in range(3)], [lossless], steps=16)[0]
    assert mine == [stock_answer("llama", dtype, tokens(41, seed=s), 16) for s in range(3)]


@pytest.mark.parametrize("name", POLICIES)
def test_keeping_everything_is_uniform_and_keeping_nothing_is_uniform(name: str) -> None:
    """ratio 1 = every token in the first tier, ratio 0 = every token in the last: both are uniform quantization."""
    if "high" not in options_of_policy(name) or len(policy(name).tiers) != 2:
        pytest.skip(f"{name} has no two tiers from outside that a ratio splits")
    if policy(name).evicts:
        pytest.skip(f"{name} evicts: with ratio 0 there is nothing to compare with")
    if policy(name).sinks:
        pytest.skip(f"{name} keeps its sinks exact, whatever the ratio is")
    for keep, tier in ((1.0, "high"), (0.0, "low")):
        bits = {"high.bits": 8, "low.bits": 3, "keep": keep}
        mine = policy(name, bits)
        uniform = policy("uniform", {"tier.bits": bits[f"{tier}.bits"], "balance": True})
        got, wanted = logits_of(engine(), [mine, uniform], steps=6)
        assert torch.equal(got, wanted)


def logits_of(run: Engine, panel: list[Policy], steps: int, ids: list[int] | None = None) -> torch.Tensor:
    """Logits [P, steps, V] of a forced continuation: all policies are fed the same tokens."""
    ids = tokens(40) if ids is None else ids
    forced = tokens(steps, seed=99)
    watched = set().union(*(one.observers for one in panel))
    cache = run.compress(run.prefill([ids], watched), panel)
    active = torch.ones(len(panel), dtype=torch.bool)
    out = []
    for i, token in enumerate(forced):
        out.append(run.step(cache, torch.full((len(panel),), token), torch.full((len(panel),), len(ids) + i), active))
    return torch.stack(out, dim=1)


def test_a_batch_is_its_rows_one_by_one(any_policy: Policy) -> None:
    """Left padding and batch mates change nothing but the last digits: answers, bytes, tokens."""
    run = engine()
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    together = run.generate(prompts, [any_policy], Decoding(10))[0]
    assert_answers_alike(together, [run.generate([p], [any_policy], Decoding(10))[0][0] for p in prompts])


def test_a_panel_is_its_policies_alone(any_policy: Policy) -> None:
    run = engine()
    panel = [named_policy(name) for name in (*POLICIES, *STRANGERS)]
    prompts = [prompt(33, seed=1), prompt(21, seed=2), prompt(40, seed=3)]
    together = run.generate(prompts, panel, Decoding(10))
    assert_answers_alike(together[panel.index(any_policy)], run.generate(prompts, [any_policy], Decoding(10))[0])


def test_a_policy_after_another_is_the_policy_alone(any_policy: Policy) -> None:
    """No state is left behind: neither on the policy, nor on the prefill, nor in the engine's memory (trap T21)."""
    run, prompts = engine(), [prompt(33, seed=3)]
    alone = engine().generate(prompts, [any_policy], Decoding(8))
    for name in POLICIES:
        run.generate([prompt(50, seed=4)], [policy(name)], Decoding(8))
        assert run.generate(prompts, [any_policy], Decoding(8)) == alone


def test_both_readers_give_the_same_numbers_bit_for_bit(any_policy: Policy) -> None:
    """The working copy holds what the packed store says, at every step of a long decode."""
    ids = tokens(37)
    assert torch.equal(logits_of(engine("working"), [any_policy], 90, ids), logits_of(engine("packed"), [any_policy], 90, ids))


def observers(any_policy: Policy) -> set[Observer]:
    """What must watch the prefill for a policy."""
    return set(any_policy.observers)


def tokens_by_tier(any_policy: Policy, cache: CompressedCache) -> list[torch.Tensor]:
    """How many tokens the tiers of a cache of one policy hold, int64 [L, B, H] each, and how many were evicted."""
    (store,) = cache.banks[0].stores
    counts = [tier.count for tier in store.tiers]
    seen = store.seen[None, :, None].expand(counts[0].shape)
    return [*counts, seen - torch.stack(counts).sum(dim=0)] if any_policy.evicts else counts


def pair_bytes(any_policy: Policy, index: int, count: int, dim: int) -> float:
    """Bytes of `count` pairs of one head in a tier: of its codes' own sizes, and of what ranks its tokens."""
    tier = any_policy.tiers[index]
    if tier.evicted:
        return 0
    numbers = count * dim
    size = sum(numbers * chain.code.size(dim) / 8 for chain in (tier.key, tier.value) if chain.code is not None)
    moves = any_policy.leaves(index)
    implied = any_policy.in_order(index) is not None  # positions follow from the slots
    kept = any_policy.importance is not None and any_policy.settled and index < any_policy.window_tier
    size += 4 * count * ((moves or kept or any_policy.positions == "contiguous" or tier.key.needs_positions) and not implied)
    return size + 4 * count * (moves and any_policy.scored)


def side_bytes(any_policy: Policy, dim: int) -> int:
    """Bytes of one head's transforms: the paper's balancer has four a channel, means, the rms balancer and a scale two, a
    range four; equal first steps of two tiers are one."""
    width = {
        "Balance(by='max')": 4,
        "Balance(by='rms')": 2,
        "Centre(rope='before')": 2,
        "Centre(rope='after')": 2,
        "Rotate()": 0,
        "Scale(by='range')": 4,
        "Scale(by='root')": 2,
    }
    tiers = [tier for tier in any_policy.tiers if not tier.evicted]
    steps = {
        (what, chain.transforms[: i + 1])
        for tier in tiers
        for what, chain in (("key", tier.key), ("value", tier.value))
        for i in range(len(chain.transforms))
    }
    return sum(width[str(chain[-1])] * dim for _, chain in steps)


def run_with_steps(any_policy: Policy, steps: int, reader: str = "working") -> Iterator[CompressedCache]:
    """The cache of two prompts before the first step and after each."""
    run = engine(reader)
    contexts = [tokens(length, seed=length) for length in (41, 23)]
    cache = run.compress(run.prefill(contexts, observers(any_policy)), [any_policy])
    positions = torch.tensor([len(c) for c in contexts])
    yield cache
    for step in range(steps):
        run.step(cache, torch.tensor(tokens(len(contexts), seed=step)), positions, torch.ones(len(contexts), dtype=torch.bool))
        positions = positions + 1
        yield cache


def test_stored_bytes_are_those_of_the_tiers_at_every_step(any_policy: Policy) -> None:
    """From the sizes of its codes and the number of tokens in each tier; nothing of the stored tensors is used."""
    geometry = engine().geometry
    dim, heads = geometry.head_dim, geometry.layers * geometry.kv_heads
    for step, cache in enumerate(run_with_steps(any_policy, steps=12)):
        counts = tokens_by_tier(any_policy, cache)
        for b, (row, length) in enumerate(zip(cache.usage(), (41, 23), strict=True)):
            assert row.seen_tokens == length + step
            pairs = sum(pair_bytes(any_policy, i, int(count[:, b].sum()), dim) for i, count in enumerate(counts))
            assert sum(row.nbytes.values()) == pairs + heads * side_bytes(any_policy, dim)
            assert row.full_nbytes == row.seen_tokens * heads * dim * 4


def test_the_declared_budget_holds_at_every_step(any_policy: Policy) -> None:
    """Generated tokens are compressed too (trap T3), and each tier holds what it should at each step (trap T23): never more
    than its quota, but for what fills no block, or waits for the next ranking; and never less than it could."""
    quotas: torch.Tensor | None = None
    for step, cache in enumerate(run_with_steps(any_policy, steps=25)):
        (store,) = cache.banks[0].stores
        counts = torch.stack(tokens_by_tier(any_policy, cache))
        assert (counts.sum(dim=0) == store.seen[None, :, None]).all()
        for row, kept in zip(cache.usage(), store.kept_tokens().tolist(), strict=True):
            assert row.kept_tokens * len(store._layers) * 2 == pytest.approx(kept)
        if isinstance(any_policy.budget, Amounts):
            lengths = store.seen if any_policy.budget.of == "seen" else torch.tensor([41, 23])
            shape = (counts.shape[0] - 1, counts.shape[1], 2, counts.shape[3])
            quotas = torch.stack([*any_policy.budget.counts(lengths), lengths])[:-1, None, :, None].expand(shape)
        elif isinstance(any_policy.budget, Residual):
            since = torch.zeros(2, dtype=torch.long) if any_policy.budget.of == "seen" else torch.tensor([41, 23])
            quotas = ((store.seen - since) % any_policy.budget.length)[None, None, :, None].expand(counts[:-1].shape)
        elif quotas is None:
            quotas = store._settled
        assert quotas is not None
        block = any_policy.tiers[-1].block
        waits = step % any_policy.every if any_policy.every else step
        held = counts.cumsum(dim=0)[:-1]
        assert (held <= quotas + block - 1 + waits).all()
        protected_below = any_policy.window_tier or any_policy.sinks_tier
        if not protected_below and any_policy.budget.grows:
            assert (held >= quotas.minimum(store.seen[None, None, :, None]) - waits).all()


def test_bytes_are_counted_from_the_tensors_that_are_stored(any_policy: Policy) -> None:
    """For one row, nbytes is the size of the used slots of the tensors themselves (trap T8), and what is allocated that of
    all."""
    run = engine("kernel")  # a dense copy keeps positions of its own beside the store
    cache = run.compress(run.prefill([tokens(40)], observers(any_policy)), [any_policy])
    store = cache.banks[0].stores[0]
    sides = [tensor for side in store.sides.values() for tensor in side.values()]
    held = [part for tier in store.tiers for part in tier.parts.values()]
    (usage,) = cache.usage()
    assert usage.allocated_nbytes == sum(t.numel() * t.element_size() for t in [*held, *sides])
    used = 0
    for tier in store.tiers:
        for name, part in tier.parts.items():
            if name == "positions" and tier._positions == "tracked":
                continue
            per = part.shape[3] / max(1, tier.slots)  # a block's parts: one for so many slots
            used += round(float(tier.count.sum()) * per) * part.shape[4] * part.element_size()
    assert sum(usage.nbytes.values()) == used + sum(t.numel() * t.element_size() for t in sides)
    assert all(part.shape[2] == run.geometry.kv_heads for tier in store.tiers for part in tier.parts.values())  # T10


def test_room_for_a_longer_answer_is_no_bytes(any_policy: Policy) -> None:
    """Provisioned length is not occupied length (trap T9)."""
    limited = engine().generate([prompt(30)], [any_policy], Decoding(4))[0][0]
    roomy = Engine(model(), {limited.tokens[3]}, 257).generate([prompt(30)], [any_policy], Decoding(200))[0][0]
    assert roomy.tokens == limited.tokens[:3]
    assert roomy.usage == limited.usage


def test_the_first_answer_token_feels_the_cache() -> None:
    """Under an absurd policy even a one-token answer must differ from the full cache's (trap T2)."""
    absurd = policy("h2o", {"keep": 0.03})
    full, mine = logits_of(engine(), [policy("full"), absurd], steps=1)
    assert (full - mine).abs().max() > 0.1
    assert answers(engine(), [prompt(60, seed=s) for s in range(8)], [absurd], 1) != answers(
        engine(), [prompt(60, seed=s) for s in range(8)], [policy("full")], 1
    )


def test_every_policy_but_full_moves_the_logits(any_policy: Policy) -> None:
    """In a prompt that is longer, and a model that is deeper, than what residuals, and layers at both ends, keep exact."""
    deep, long = engine(layers=6), tokens(300)
    full, mine = logits_of(deep, [policy("full"), any_policy], 3, long)
    assert torch.equal(full, mine) == any_policy.lossless


def test_what_comes_later_does_not_change_what_was_decided(any_policy: Policy) -> None:
    """Scores never look ahead (trap T18): two continuations that part at step 6 leave the same stores before it."""
    run = engine()
    states = []
    for last in (1, 200):
        cache = run.compress(run.prefill([tokens(30)], observers(any_policy)), [any_policy])
        for step, token in enumerate([5, 6, 7, 8, 9, 10, last]):
            if step == 6:
                states.append([{n: p.clone() for n, p in tier.parts.items()} for tier in cache.banks[0].stores[0].tiers])
            run.step(cache, torch.tensor([token]), torch.tensor([30 + step]), torch.ones(1, dtype=torch.bool))
    for first, second in zip(*states, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stored_token_never_changes(any_policy: Policy) -> None:
    """No drift (trap T13): while a token stays in its tier its codes are the same bits, over 120 steps."""
    run = engine()
    cache = run.compress(run.prefill([tokens(30)], observers(any_policy)), [any_policy])
    tiers = cache.banks[0].stores[0].tiers

    def content(tier: TierStore) -> dict[int, bytes]:
        positions = tier.positions()[0, 0, 0, : int(tier.count[0, 0, 0])].tolist()
        parts = [p[0, 0, 0] for n, p in tier.parts.items() if n.startswith(("keys", "values"))]
        return {  # a block's parts: one for so many slots
            pos: b"".join(p[slot * len(p) // tier.slots].contiguous().view(torch.uint8).numpy().tobytes() for p in parts)
            for slot, pos in enumerate(positions)
        }

    known: list[dict[int, bytes]] = [{} for _ in tiers]
    for step in range(120):
        for tier, of_tier in zip(tiers, known, strict=True):
            for position, bytes_now in content(tier).items():
                assert of_tier.setdefault(position, bytes_now) == bytes_now
        run.step(cache, torch.tensor([step]), torch.tensor([30 + step]), torch.ones(1, dtype=torch.bool))
    assert max(map(len, known)) > 20


def held_by_tier(run: Engine, cache: CompressedCache, begin: int, end: int, b: int) -> dict[str, float]:
    """Shares of row b's tokens at positions begin <= p < end, counted token by token in what each store holds."""
    counts: Counter[str] = Counter()
    for bank in cache.banks:
        (store,) = bank.stores
        for tier, (positions, used, _, _) in zip(store.tiers, store.read(), strict=True):
            held = positions[:, b][used[:, b]]
            counts[str(tier.tier)] += int(((held >= begin) & (held < end)).sum())
    total = (end - begin) * run.geometry.layers * run.geometry.kv_heads
    if total and store.policy.evicts:
        counts["0"] = total - counts.total()
    return {bits: count / total for bits, count in counts.items()} if total else {}


def test_no_more_is_allocated_than_the_next_tokens_need(any_policy: Policy) -> None:
    """Slots in advance are a few, so that memory is what the counted bytes say it is."""
    run = engine("kernel")
    cache = run.compress(run.prefill([tokens(300)], observers(any_policy)), [any_policy])
    for step in range(40):
        (usage,) = cache.usage()
        (store,) = cache.banks[0].stores
        counted = sum(usage.nbytes.values())
        tracked = sum(t.parts["positions"].nbytes for t in store.tiers if t._positions == "tracked")  # no part of the cache
        uneven = max(float(t.count.max() / t.count.double().mean().clamp(min=1e-9)) for t in store.tiers)
        spare = 4 + any_policy.every + any_policy.tiers[-1].block  # tokens that come at once, and a few
        assert counted <= usage.allocated_nbytes - tracked
        assert usage.allocated_nbytes - tracked <= 1.05 * uneven * counted + spare * usage.full_nbytes / usage.seen_tokens
        run.step(cache, torch.tensor([step]), torch.tensor([300 + step]), torch.ones(1, dtype=torch.bool))


@pytest.mark.parametrize("reader", ["working", "kernel"])
def test_the_tiers_of_watched_tokens_are_those_of_the_store(any_policy: Policy, reader: str) -> None:
    """When the first token is fed, and later, when stores have grown and hold unused slots; also where the last tier does not
    know the positions of its tokens."""
    spans = [(3, 19), (0, 22), (0, 0)]
    begin, end = torch.tensor(spans).unbind(1)
    prompts = [replace(prompt(n, seed=n), watched=span) for n, span in zip((41, 23, 30), spans, strict=True)]
    run, tracked = engine(reader), engine()
    state = run.prefill([p.context for p in prompts], observers(any_policy))
    cache, known = (each.compress(state, [any_policy], torch.tensor([41, 23, 30])) for each in (run, tracked))
    reported = [generation.watched_tiers for generation in run.generate(prompts, [any_policy], Decoding(3))[0]]
    assert reported == [pytest.approx(shares) for shares in cache.tiers(begin, end)]
    for step in range(40):
        for b, shares in enumerate(cache.tiers(begin, end)):
            assert shares == pytest.approx(held_by_tier(run, known, *spans[b], b))
            assert not shares or sum(shares.values()) == pytest.approx(1)
        positions = torch.tensor([len(p.context) + step for p in prompts])
        for each, of_it in ((run, cache), (tracked, known)):
            each.step(of_it, torch.tensor(tokens(3, seed=step)), positions, torch.tensor([True, step < 20, True]))


def test_a_hidden_question_is_fed_through_the_compressed_cache(any_policy: Policy) -> None:
    """Ragged questions of a batch give what each gives alone."""
    run = engine()
    prompts = [prompt(40, seed=1, question=9), prompt(25, seed=2, question=3), prompt(12, seed=3, question=12)]
    together = run.generate(prompts, [any_policy], Decoding(6))[0]
    assert_answers_alike(together, [run.generate([p], [any_policy], Decoding(6))[0][0] for p in prompts])
    assert together[2].compressed_tokens == 0  # nothing was there to be compressed


def test_an_empty_context_decodes_from_nothing(any_policy: Policy) -> None:
    """A prompt of one token: the cache is empty when it is compressed, and serves all the same."""
    got = engine().generate([Prompt([], [7])], [any_policy], Decoding(30))[0][0]
    assert len(got.tokens) == 30
    assert got.compressed_tokens == 0
    assert got.usage.seen_tokens == 30
    if any_policy.lossless:
        assert got.tokens == stock_answer("llama", torch.float32, [7], 30)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("architecture", "heads"), [("llama", (4, 4)), ("mistral", (6, 2)), ("qwen2", (8, 2)), ("qwen3", (8, 1))]
)
def test_architectures_and_group_sizes(name: str, architecture: str, heads: tuple[int, int]) -> None:
    """Four architectures, GQA ratios 1, 3, 4 and 8: 16 bits = the stock cache, and the policy itself runs."""
    shape: dict[str, Any] = {"query_heads": heads[0], "kv_heads": heads[1], "hidden_size": 16 * heads[0]}
    run = engine(architecture=architecture, **shape)
    mine = answers(run, [prompt(29)], [bits_everywhere(name, 16), policy(name)], steps=8)
    assert mine[0][0] == stock_answer(architecture, torch.float32, tokens(29), 8, **shape)
    assert len(mine[1][0]) == 8


@pytest.mark.parametrize("head_dim", [64, 128])
def test_head_dimensions_of_real_models(any_policy: Policy, head_dim: int) -> None:
    run = engine(head_dim=head_dim)
    assert torch.equal(
        logits_of(run, [any_policy], 4), logits_of(Engine(model(head_dim=head_dim), NO_END, 257, "packed"), [any_policy], 4)
    )


def test_policies_are_frozen(any_policy: Policy) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        any_policy.keep = 0.5  # type: ignore[attr-defined]
