"""The packed store in the small: demotion, three tiers, the balancer, positions; a slow list-based cache as reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from conftest import engine, tokens
from rounding import assert_rows_alike

from baselines.h2o import h2o
from baselines.streaming_llm import streaming_llm
from mikv.budget import Amounts
from mikv.cache.compressed import CompressedCache
from mikv.cache.dense import ByColumn, BySlot
from mikv.cache.policy_store import PolicyStore, Received
from mikv.config import policy
from mikv.importance.scores import Accumulated
from mikv.mikv import mikv
from mikv.policy import Policy
from mikv.quant.tier import Tier
from mikv.rope import Rope

LADDER = Policy(
    "ladder", "ladder", (Tier(16), Tier(8).balanced(), Tier(2).balanced()), Amounts((0.2, 0.3)), Accumulated(), recent=0.5
)
LADDER_EVICTING = Policy("ladder0", "ladder0", (Tier(16), Tier(4), Tier(0)), Amounts((0.2, 0.3)), Accumulated(), recent=0.5)
LADDER_REINDEXED = replace(LADDER_EVICTING, positions="contiguous")
UNEVEN = Policy("uneven", "uneven", (Tier(16), Tier(2, key_bits=4)), Amounts((0.25,)), Accumulated(), recent=0.5)


def start(chosen: Policy, contexts: list[list[int]], reader: str = "working") -> tuple[CompressedCache, PolicyStore]:
    run = engine(reader)
    cache = run.compress(run.prefill(contexts, chosen.observers), [chosen])
    return cache, cache.banks[0].stores[0]


def members(store: PolicyStore, layer: int, row: int, head: int) -> list[set[int]]:
    """Positions in each tier that knows them (the last one need not, and holds the rest)."""
    known = [t for t in store.tiers if t.knows_positions]
    return [set(t.positions()[layer, row, head, : int(t.count[layer, row, head])].tolist()) for t in known]


class ListCache:
    """The method with Python lists, one head: written from the paper's description, not from the store."""

    def __init__(self, chosen: Policy, scores: list[float]) -> None:
        self.policy, self.scores, self.seen = chosen, dict(enumerate(scores)), len(scores)
        ranked = sorted(range(self.seen), key=self.rank, reverse=True)
        cuts = [0, *self.quotas(), self.seen]
        self.tiers = [set(ranked[a:b]) for a, b in pairwise(cuts)]

    def quotas(self) -> list[int]:
        assert isinstance(self.policy.budget, Amounts)
        return [int(q) for q in self.policy.budget.counts(torch.tensor(self.seen))]

    def rank(self, position: int) -> tuple[int, float, int]:
        recents = int(self.policy.recent * self.quotas()[0])
        recent = position >= self.seen - recents
        return (int(recent), position if recent else self.scores[position], position)

    def step(self, mass: dict[int, float]) -> None:
        new = self.seen
        self.scores[new] = 0.0
        for position, received in mass.items():
            self.scores[position] += received
        self.seen += 1
        self.tiers[0].add(new)
        for i, quota in enumerate(self.quotas()):
            if sum(len(tier) for tier in self.tiers[: i + 1]) > quota:
                victim = min(self.tiers[i], key=self.rank)
                self.tiers[i].remove(victim)
                self.tiers[i + 1].add(victim)


@pytest.mark.parametrize("chosen", [mikv(), mikv(recent=0.0), mikv(recent=1.0), h2o(keep=0.5), LADDER, LADDER_EVICTING])
def test_demotion_is_that_of_a_cache_made_of_lists(chosen: Policy) -> None:
    """Attend -> add scores -> demote, step by step, for every head, in a padded batch."""
    run = engine()
    contexts = [tokens(31), tokens(18, seed=1)]
    observer = Accumulated().observer
    state = run.prefill(contexts, {observer})
    cache = run.compress(state, [chosen])
    bank = cache.banks[0]
    observed = state.banks[0].observed[observer]
    places = [(layer, row, head) for layer in range(2) for row in range(2) for head in range(2)]
    reference = {
        (layer, row, head): ListCache(chosen, observed[layer, row, head, 31 - len(contexts[row]) :].tolist())
        for layer, row, head in places
    }
    seen: list[dict[tuple[int, int, int], dict[int, float]]] = []  # attention by position
    store = bank.stores[0]
    step_of_store = store.step

    def spy(keys: torch.Tensor, values: torch.Tensor, received: Received, active: torch.Tensor) -> object:
        assert received.newest is not None
        seen.append({place: {int(store.seen[place[1]]): float(received.newest[place])} for place in places})
        for tier, mass in zip(store.tiers, received.tiers, strict=True):
            if mass is not None:
                for place in places:
                    used = int(tier.count[place])
                    seen[-1][place].update(
                        zip(tier.positions()[place][:used].tolist(), mass[place][:used].tolist(), strict=True)
                    )
        return step_of_store(keys, values, received, active)

    store.step = spy  # type: ignore[method-assign,assignment]
    positions = torch.tensor([31, 18])
    for step in range(40):
        run.step(cache, torch.tensor(tokens(2, seed=step)), positions, torch.ones(2, dtype=torch.bool))
        positions = positions + 1
        for (layer, row, head), lists in reference.items():
            lists.step(seen[-1][layer, row, head])
            stored = members(store, layer, row, head)
            assert stored == lists.tiers[: len(stored)], (step, layer, row, head)


@pytest.mark.parametrize("chosen", [LADDER, LADDER_EVICTING, UNEVEN, policy("mikv"), policy("h2o")])
def test_a_token_only_goes_down(chosen: Policy) -> None:
    cache, store = start(chosen, [tokens(30)])
    run = engine()
    best: dict[int, int] = {}
    for step in range(60):
        for tier, inside in enumerate(members(store, 0, 0, 0)):
            for position in inside:
                assert tier >= best.get(position, tier)
                best[position] = tier
        run.step(cache, torch.tensor([step]), torch.tensor([30 + step]), torch.ones(1, dtype=torch.bool))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_token_is_quantized_once_from_its_exact_value(bits: int) -> None:
    """With a 16-bit tier above: what ends up in the low tier equals quantizing the 16-bit value, whenever it was demoted."""
    from mikv.quant.affine import dequantize, quantize

    cache, store = start(mikv(low=Tier(bits), balance=False, keep=0.5), [tokens(20)])
    run = engine()
    exact: dict[int, torch.Tensor] = {}
    for step in range(40):
        top = store.tiers[0]
        for slot, position in enumerate(top.positions()[1, 0, 1, : int(top.count[1, 0, 1])].tolist()):
            exact[position] = top.parts["keys.raw"][1, 0, 1, slot].clone()
        run.step(cache, torch.tensor([step]), torch.tensor([20 + step]), torch.ones(1, dtype=torch.bool))
    low = store.tiers[1]
    keys, _ = low.read()
    demoted = 0
    for slot, position in enumerate(low.positions()[1, 0, 1, : int(low.count[1, 0, 1])].tolist()):
        if position in exact:  # was in the high tier first
            assert torch.equal(keys[1, 0, 1, slot], dequantize(quantize(exact[position], bits, 8)))
            demoted += 1
    assert demoted >= 10


def test_from_8_to_2_bits_the_error_is_bounded_by_both_steps() -> None:
    """The one double rounding there is: half a step of each tier, and the FP16 rounding of the grid."""
    from mikv.quant.affine import dequantize, quantize

    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    high = quantize(x, 8, 32)
    low = quantize(dequantize(high), 2, 32)
    bound = (high.scale.float() + low.scale.float()).repeat_interleave(32, dim=1) / 2 * 1.01 + 4e-3
    assert ((dequantize(low) - x).abs() <= bound).all()


def test_balanced_keys_read_back_unbalanced() -> None:
    """8 bits with the balancer is close to the exact key: what is stored is Q(k b), what is read is Q(k b) / b."""
    run = engine()
    state = run.prefill([tokens(40)])
    store = run.compress(state, [policy("uniform", {"tier.bits": 8, "balance": True})]).banks[0].stores[0]
    keys, values = store.tiers[0].read()
    ((side,),) = [list(side.values()) for side in store.sides.values()]
    assert not torch.allclose(side, torch.ones_like(side))
    for got, exact in ((keys, state.banks[0].keys), (values, state.banks[0].values)):
        assert (got - exact).norm() / exact.norm() < 0.01


def test_full_and_evicting_policies_store_no_balancer() -> None:
    tiers = (Tier(16).balanced(), Tier(0).balanced())
    _, store = start(Policy("p", "p", tiers, Amounts((0.5,)), Accumulated()), [tokens(20)])
    assert not store.sides


@pytest.mark.parametrize("reader", ["working", "packed", "kernel"])
def test_contiguous_positions_are_those_of_a_recomputed_rope(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """StreamingLLM: re-indexed keys equal keys that were rotated by their place in the cache (trap T20)."""
    run = engine(reader)
    ids = tokens(50)
    chosen = streaming_llm(keep=0.3, sinks=4, positions="contiguous")
    cache, store = start(chosen, [ids], reader)
    run.step(cache, torch.tensor([3]), torch.tensor([50]), torch.ones(1, dtype=torch.bool))
    (tier,) = store.tiers
    slots, used = tier.slots, int(tier.count[0, 0, 0])
    held = tier.positions()[0, 0, 0, :used]
    shown: list[torch.Tensor] = []
    rotate = Rope.turn
    monkeypatch.setattr(Rope, "turn", lambda *args: (shown.append(rotate(*args)), shown[-1])[1])
    run.step(cache, torch.tensor([5]), torch.tensor([51]), torch.ones(1, dtype=torch.bool))
    mine = shown[0][0, 0, -slots:][held.argsort()]  # of the first layer, in order
    kept = sorted(held.tolist())

    decoder = run.model.get_decoder()
    with torch.inference_mode():
        hidden = decoder.layers[0].input_layernorm(decoder.embed_tokens(torch.tensor([[*ids, 3]])))
        bare = decoder.layers[0].self_attn.k_proj(hidden)[0].unflatten(-1, (2, 16))[kept, 0]
        # the query stands at 51; inside the cache it has index len(kept): what counts is the distance
        places = torch.arange(len(kept))[None] + 51 - len(kept)
        cos, sin = decoder.rotary_emb(bare, places)
    left, right = bare.chunk(2, dim=-1)
    wanted = bare * cos[0] + torch.cat((-right, left), dim=-1) * sin[0]
    assert torch.allclose(mine, wanted, atol=4e-3)  # stored in FP16
    assert kept[:4] == [0, 1, 2, 3]


def test_original_and_contiguous_differ_only_after_eviction() -> None:
    run = engine()
    ids = tokens(30)
    for keep, same in ((1.0, True), (0.4, False)):
        panel = [streaming_llm(keep=keep, positions=p) for p in ("original", "contiguous")]
        cache = run.compress(run.prefill([ids]), panel)
        logits = run.step(cache, torch.tensor([1, 1]), torch.tensor([30, 30]), torch.ones(2, dtype=torch.bool))
        assert torch.allclose(logits[0], logits[1], atol=1e-5) == same


def test_dropped_rows_leave_the_others_as_they_were() -> None:
    """A fork without rows from the middle of a panel decodes on like the whole."""
    run = engine()
    panel = [policy("full"), policy("mikv"), policy("streaming_llm"), policy("h2o")]
    contexts = [tokens(25), tokens(31, seed=1), tokens(12, seed=2)]
    state = run.prefill(contexts, {Accumulated().observer})
    whole, cut = run.compress(state, panel), run.compress(state, panel)
    rows = torch.tensor([True, False, True, False, False, False, True, True, False, False, True, True])
    positions = torch.tensor([len(c) for c in contexts] * len(panel))
    everyone = torch.ones(12, dtype=torch.bool)
    fed = torch.arange(12)
    run.step(whole, fed, positions, everyone)
    run.step(cut, fed, positions, everyone)
    cut = cut.fork(rows.nonzero().squeeze(1))
    for step in range(6):
        positions = positions + 1
        reference = run.step(whole, fed + step, positions, everyone)[rows]
        got = run.step(cut, (fed + step)[rows], positions[rows], everyone[rows])
        assert_rows_alike(got, reference)
    assert [u for u, there in zip(whole.usage(), rows.tolist(), strict=True) if there] == cut.usage()
    for mine, other in zip(contents(cut), contents(whole, rows), strict=True):
        assert mine.keys() == other.keys()
        assert sum(torch.allclose(mine[place], other[place], atol=1e-3) for place in mine) > 0.98 * len(mine)


def contents(cache: CompressedCache, rows: torch.Tensor | None = None) -> list[dict[tuple[int, ...], torch.Tensor]]:
    """Of each row (of those in `rows`, bool) what is stored: key and value by tier, layer, head and position."""
    found = []
    for store in cache.banks[0].stores:
        for b in range(len(store.seen)):
            held = {}
            for tier, (positions, used, keys, values) in enumerate(store.read()):
                for layer, head in product(range(2), range(2)):
                    for slot in used[layer, b, head].nonzero().flatten().tolist():
                        place = (tier, layer, head, int(positions[layer, b, head, slot]))
                        held[place] = torch.cat((keys[layer, b, head, slot], values[layer, b, head, slot]))
            found.append(held)
    return found if rows is None else [held for held, there in zip(found, rows.tolist(), strict=True) if there]


def test_rows_that_have_ended_stay_as_they_are() -> None:
    run = engine()
    cache = run.compress(run.prefill([tokens(25), tokens(25, seed=1)], {Accumulated().observer}), [policy("mikv")])
    before = cache.usage()
    for step in range(5):
        run.step(cache, torch.tensor([1, 2]), torch.tensor([25, 25 + step]), torch.tensor([False, True]))
    after = cache.usage()
    assert after[0] == before[0]
    assert after[1].seen_tokens == 30


def test_a_prefill_serves_many_caches_and_is_not_changed() -> None:
    run = engine()
    state = run.prefill([tokens(30)], {Accumulated().observer})
    copies = [t.clone() for t in (state.banks[0].keys, state.banks[0].values, *state.banks[0].observed.values())]
    for name in ("mikv", "h2o", "uniform"):
        cache = run.compress(state, [policy(name)])
        run.step(cache, torch.tensor([1]), torch.tensor([30]), torch.ones(1, dtype=torch.bool))
    now = (state.banks[0].keys, state.banks[0].values, *state.banks[0].observed.values())
    assert all(torch.equal(a, b) for a, b in zip(copies, now, strict=True))


@pytest.mark.parametrize(("budget", "grows"), [("ratio", True), ("fixed", False)])
def test_both_budget_readings(budget: str, grows: bool) -> None:
    """ratio: floor(r * seen) at each step; fixed: floor(r * prompt) for good (trap T12)."""
    cache, store = start(mikv(keep=0.25, budget=budget), [tokens(40)])
    run = engine()
    for step in range(20):
        run.step(cache, torch.tensor([1]), torch.tensor([40 + step]), torch.ones(1, dtype=torch.bool))
        assert int(store.tiers[0].count[0, 0, 0]) == ((41 + step) // 4 if grows else 10)


@pytest.mark.parametrize("reader", ["packed", "kernel"])
@pytest.mark.parametrize("chosen", [LADDER, LADDER_EVICTING, LADDER_REINDEXED, UNEVEN])
def test_ladders_decode(chosen: Policy, reader: str) -> None:
    """Any number of tiers, keys and values apart; dense readers agree bit for bit, the kernels' up to rounding: at first
    closely, as they read the same codes, then but for codes of new tokens that flip."""
    outputs, tiers = [], []
    for kind in ("working", reader):
        cache, store = start(chosen, [tokens(30)], kind)
        run = engine(kind)
        steps = [run.step(cache, torch.tensor([s]), torch.tensor([30 + s]), torch.ones(1, dtype=torch.bool)) for s in range(20)]
        outputs.append(torch.cat(steps))
        tiers.append([members(store, layer, 0, head) for layer, head in product(range(2), range(2))])
    assert outputs[0].isfinite().all()
    if reader == "packed":
        assert torch.equal(*outputs)
    else:
        assert torch.allclose(outputs[0][0], outputs[1][0], atol=1e-4)
        assert_rows_alike(*outputs)
    for dense, read in zip(*tiers, strict=True):
        assert dense[: len(read)] == read
        assert len(dense) - len(read) <= 1


def test_what_was_evicted_is_not_in_the_copy() -> None:
    """An evicting policy's dense copy has room for what its store holds, however long the prompt; the others share one."""
    run = engine()
    panel = [policy("full"), policy("h2o", {"keep": 0.1}), policy("mikv"), policy("streaming_llm", {"keep": 0.2})]
    cache = run.compress(run.prefill([tokens(200), tokens(150, seed=1)], {Accumulated().observer}), panel)
    (h2o_reader, streaming_reader, shared) = cache.banks[0].readers
    assert [[store.policy.name for store in reader.stores] for reader in cache.banks[0].readers] == [
        ["h2o"], ["streaming_llm"], ["full", "mikv"],
    ]  # fmt: skip
    assert isinstance(h2o_reader, BySlot)
    assert isinstance(streaming_reader, BySlot)
    assert isinstance(shared, ByColumn)
    assert h2o_reader.keys.shape[1:4] == (2, 2, 1 + 20)
    assert streaming_reader.keys.shape[1:4] == (2, 2, 1 + 40)
    assert shared.keys.shape[3] > 200
