"""Who moves where, step by step: the store against a cache made of Python lists, for every kind of policy; and the budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch
from conftest import POLICIES, STRANGERS, engine, named_policy, tokens

from mikv.assignment import lowest
from mikv.budget import AcrossHeads, Amounts, Bytes, PerLayer, Residual
from mikv.cache.policy_store import PolicyStore, Received
from mikv.cache.tier_store import Pairs, TierStore
from mikv.importance.base import Context
from mikv.importance.last_query import LastQuery
from mikv.importance.probes import Salience
from mikv.importance.scores import Accumulated, Noise
from mikv.mikv import mikv
from mikv.policy import Policy
from mikv.quant.base import Sample, Side, Transform, Where
from mikv.quant.tier import Tier

Place = tuple[int, int, int]

RERANKED = Policy(
    "reranked", "reranked", (Tier(16), Tier(4), Tier(0)), Amounts((0.2, 0.3)), Accumulated(), recent=0.5, every=7
)  # fmt: skip
BLOCKS = Policy(
    "blocks",
    "blocks",
    (Tier(16), Tier(8), Tier(key="channel3/8", value="channel3/8")),
    Amounts((0.1, 0.2)),
    Accumulated(),
    every=3,
)
PROTECTED = Policy(  # sinks in the second tier, the last tokens in the third: both pass what stands above
    "protected", "protected", (Tier(16), Tier(8), Tier(4), Tier(2)), Amounts((0.1, 0.1, 0.2), (0, 3, 5)), Accumulated(),
    sinks=3, sinks_tier=1, window=5, window_tier=2,
)  # fmt: skip
PROMPT_ONLY = Policy("prompt", "prompt", (Tier(16), Tier(2)), Amounts((0.3,)), Noise(), window=2, every=0)
TWO_BLOCKS = Policy(  # keys in blocks of 16, values in blocks of 8
    "two_blocks", "two_blocks", (Tier(16), Tier(key="channel2/16", value="channel4/8")), Amounts((0.1,))
)
RESIDUAL = Policy("residual", "residual", (Tier(16), Tier(key="channel2/8", value=2)), Residual(16))
GENERATED = Policy("generated", "generated", (Tier(16), Tier(4)), Residual(16, "generated"))
EXTRA = {p.name: p for p in (RERANKED, BLOCKS, PROTECTED, PROMPT_ONLY, TWO_BLOCKS, RESIDUAL, GENERATED)}


class Lists:
    """One head. Written from the words of mikv/policy.py, not from the store."""

    def __init__(self, policy: Policy, scores: dict[int, float] | None, quotas: list[int], seen: int) -> None:
        self.policy, self.scores, self.quotas, self.seen, self.steps = policy, scores, quotas, seen, 0
        self.tiers: list[list[int]] = []
        left = list(range(seen))
        for tier, quota in enumerate(quotas):
            room = quota - sum(map(len, self.tiers))
            best = sorted((p for p in left if not self.below(p, tier)), key=lambda p, t=tier: self.rank(p, t), reverse=True)
            self.tiers.append(best[: max(0, room)])
            left = [p for p in left if p not in self.tiers[-1]]
        over = len(left) % policy.tiers[-1].block
        if over:
            best = sorted(left, key=lambda p: self.rank(p, len(quotas)), reverse=True)[:over]
            self.tiers[-1] += best
            left = [p for p in left if p not in best]
        self.tiers.append(left)

    def below(self, position: int, tier: int) -> bool:
        """Whether a token is protected in a tier below this one."""
        if position < self.policy.sinks:
            return self.policy.sinks_tier > tier
        return position >= self.seen - self.policy.window and self.policy.window_tier > tier

    def rank(self, position: int, tier: int) -> tuple[float, ...]:
        if self.below(position, tier):
            return (-1, 0, position)
        if position < self.policy.sinks:
            return (3, -position, position)
        if position >= self.seen - self.policy.window:
            return (2, position, position)
        if self.quotas and position >= self.seen - int(self.policy.recent * self.quotas[0]):
            return (1, position, position)
        return (0, position if self.scores is None else self.scores[position], position)

    def step(self, mass: dict[int, float], score: float, quotas: list[int]) -> None:
        new, self.quotas = self.seen, quotas
        if self.scores is not None:
            self.scores[new] = score
            if isinstance(self.policy.importance, Salience):  # the mean of all queries that saw a token, this one included
                self.scores = {p: s + (mass.get(p, 0.0) - s) / (new + 1 - p) for p, s in self.scores.items()}
            elif isinstance(self.policy.importance, LastQuery):
                self.scores = {p: mass.get(p, 0.0) for p in self.scores}
            elif isinstance(self.policy.importance, Accumulated):
                self.scores = {p: self.scores[p] + mass.get(p, 0.0) for p in self.scores}
        self.seen += 1
        self.steps += 1
        due = self.policy.every and self.steps % self.policy.every == 0
        arriving = [new]
        for tier, quota in enumerate(quotas):
            self.tiers[tier] += arriving
            over = max(0, sum(map(len, self.tiers[: tier + 1])) - quota) if due else 0
            over = min(max(over, sum(self.below(p, tier) for p in arriving)), len(self.tiers[tier]))
            block = self.policy.tiers[tier + 1].block
            arriving = sorted(self.tiers[tier], key=lambda p, t=tier: self.rank(p, t))[: over // block * block]
            self.tiers[tier] = [p for p in self.tiers[tier] if p not in arriving]
        self.tiers[len(quotas)] += arriving


def quotas_of(store: Any, place: Place) -> list[int]:
    context = store._context(torch.zeros(1, 1, 1, 0), torch.zeros(1, 16), torch.zeros(1))
    return [int(q) for q in store._quotas(context)[(slice(None), *place)]]


@pytest.mark.parametrize("lengths", [(61, 38), (6, 1)])
@pytest.mark.parametrize("name", [*POLICIES, *STRANGERS, *EXTRA])
def test_tokens_move_as_in_a_cache_made_of_lists(name: str, lengths: tuple[int, int]) -> None:
    """A padded batch, every layer and head, through sixty steps; also where sinks and a window are longer than the prompt."""
    policy = EXTRA[name] if name in EXTRA else named_policy(name)
    policy = replace(policy, positions="original")
    run = engine()
    importance = policy.importance
    state = run.prefill([tokens(length, seed=length) for length in lengths], policy.observers)
    (bank,) = state.banks
    cache = run.compress(state, [policy])
    (store,) = cache.banks[0].stores
    scores = store.score_prompt(state, bank)
    places: list[Place] = list(product(range(2), range(2), range(2)))
    lists = {}
    for place in places:
        first = lengths[0] - lengths[place[1]]
        mine = None if scores is None else dict(enumerate(scores[place][first:].tolist()))
        lists[place] = Lists(policy, mine, quotas_of(store, place), lengths[place[1]])
    masses: list[dict[Place, dict[int, float]]] = []
    step_of_store = store.step

    def spy(keys: torch.Tensor, values: torch.Tensor, received: Received, active: torch.Tensor) -> object:
        seen: dict[Place, dict[int, float]] = {place: {} for place in places}
        if received.newest is not None:
            for place in places:
                seen[place][int(store.seen[place[1]])] = float(received.newest[place])
        for tier, mass in zip(store.tiers, received.tiers, strict=False):
            if mass is not None:
                for place in places:
                    held = tier.positions()[place][: int(tier.count[place])].tolist()
                    seen[place].update(zip(held, mass[place][: len(held)].tolist(), strict=True))
        if isinstance(importance, LastQuery):  # all heads of a layer rank by the mean over them
            for layer, row in product(range(2), range(2)):
                heads = [seen[layer, row, head] for head in range(2)]
                mean = {p: sum(one[p] for one in heads) / 2 for p in heads[0]}
                seen |= {(layer, row, head): mean for head in range(2)}
        masses.append(seen)
        return step_of_store(keys, values, received, active)

    store.step = spy  # type: ignore[method-assign,assignment]
    moved = 0
    for step in range(60):
        positions = torch.tensor(lengths) + step
        run.step(cache, torch.tensor(tokens(2, seed=step)), positions, torch.ones(2, dtype=torch.bool))
        for place, mine in lists.items():
            score = 0.0
            if isinstance(importance, Noise):
                context = store._context(positions[None, :, None, None].expand(2, 2, 2, 1), store.seen, store.seen)
                score = float(importance.score(context)[(*place, 0)])
            before = [set(tier) for tier in mine.tiers]
            mine.step(masses[-1][place], score, quotas_of(store, place))
            moved += sum(len(old - set(new)) for old, new in zip(before, mine.tiers, strict=True))
            held = [set(t.positions()[place][: int(t.count[place])].tolist()) for t in store.tiers]
            assert held == [set(tier) for tier in mine.tiers[: len(held)]], (step, place)
    room = policy.budget.room(0) >= max(lengths) + 60
    waits = isinstance(policy.budget, Residual) and policy.budget.length > 60
    assert moved or room or waits or policy.budget.whole == len(policy.tiers) or not 0 < policy.every <= 60


def test_neighbours_in_time_share_a_block() -> None:
    """Whatever their scores, the tokens of a block lie in the order of their positions."""
    run = engine()
    cache = run.compress(run.prefill([tokens(50)], {Accumulated().observer}), [BLOCKS])
    for step in range(60):
        run.step(cache, torch.tensor([step]), torch.tensor([50 + step]), torch.ones(1, dtype=torch.bool))
    last = cache.banks[0].stores[0].tiers[-1]
    for layer, head in product(range(2), range(2)):
        count = int(last.count[layer, 0, head])
        assert count % 8 == 0
        assert count > 40
        blocks = last.positions()[layer, 0, head, :count].view(-1, 8)
        assert torch.equal(blocks, blocks.sort(dim=-1).values)


def test_blocks_of_keys_and_of_values_may_differ() -> None:
    """Bytes are those of each one's own blocks, and the two dense readers agree through flushes of both."""
    logits = []
    for reader in ("working", "packed"):
        run = engine(reader)
        cache = run.compress(run.prefill([tokens(50)]), [TWO_BLOCKS])
        active = torch.ones(1, dtype=torch.bool)
        logits.append([run.step(cache, torch.tensor([s]), torch.tensor([50 + s]), active) for s in range(40)])
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))
    (store,) = cache.banks[0].stores
    coded = int(store.tiers[1].count.sum())
    assert coded > 0
    sizes = {name: int(size) for name, size in store.tiers[1].nbytes().items()}
    assert sizes["codes"] == coded * 16 * (2 + 4) // 8
    assert sizes["scale"] == sizes["zero"] == 2 * 16 * (coded // 16 + coded // 8)
    with pytest.raises(ValueError, match="multiple of the other"):
        Tier(key="channel2/12", value="channel2/8")


@dataclass(frozen=True)
class Watching:
    """Keeps every context that it is shown."""

    seen: list[Context] = field(default_factory=list, compare=False)
    observer = None

    def score(self, context: Context) -> torch.Tensor:
        self.seen.append(context)
        return torch.zeros(context.positions.shape)

    def update(self, scores: torch.Tensor, mass: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return scores


def test_a_score_sees_what_it_needs() -> None:
    """Keys and values, positions, lengths, and what a layer's output is multiplied by; of a step its token and its mass."""
    run = engine()
    state = run.prefill([tokens(20), tokens(12, seed=1)])
    (bank,) = state.banks
    score = Watching()
    policy = Policy("w", "w", (Tier(16), Tier(2)), Amounts((0.5,)), score, sinks=2, window=3)
    cache = run.compress(state, [policy], torch.tensor([21, 13]))
    run.step(cache, torch.tensor([1, 2]), torch.tensor([20, 12]), torch.ones(2, dtype=torch.bool))
    bank_of_step = cache.banks[0]
    prompt, step = score.seen
    assert torch.equal(prompt.keys, bank.keys)
    assert torch.equal(prompt.values, bank.values)
    assert prompt.prompt_lengths.tolist() == step.prompt_lengths.tolist() == [21, 13]
    assert prompt.positions[0, 1, 0].tolist() == list(range(-8, 12))
    assert prompt.protected[0, 1, 0].nonzero().flatten().tolist() == [8, 9, 17, 18, 19]
    assert prompt.mass is None
    assert torch.equal(step.keys.squeeze(3), bank_of_step.keys)
    assert step.positions[0, :, 0, 0].tolist() == [20, 12]
    assert step.seen.tolist() == [21, 13]
    assert step.mass is not None
    assert (step.mass > 0).all()
    for context in (prompt, step):
        assert context.output_projection is not None
        for layer in range(2):
            out = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(layer))
            wanted = run.model.get_decoder().layers[layer].self_attn.o_proj(out.flatten(1))
            got = torch.einsum("bhd,ohd->bo", out, context.output_projection(layer))
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("every", [1, 7])
def test_a_copy_by_slots_follows_tokens_that_change_their_slots(every: int) -> None:
    """Several are evicted at once and the last ones fill the gaps: the working copy is the packed store, bit for bit."""
    policy = replace(RERANKED, tiers=(Tier(16), Tier(0)), budget=Amounts((0.3,)), every=every)
    logits = []
    for reader in ("working", "packed"):
        run = engine(reader)
        cache = run.compress(run.prefill([tokens(50)], {Accumulated().observer}), [policy])
        active = torch.ones(1, dtype=torch.bool)
        logits.append([run.step(cache, torch.tensor([s]), torch.tensor([50 + s]), active) for s in range(40)])
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))


def test_transforms_are_fitted_without_the_sinks() -> None:
    policy = named_policy("ladder")
    run = engine()
    state = run.prefill([tokens(30), tokens(21, seed=1)], {Accumulated().observer})
    (bank,) = state.banks
    spoiled = replace(bank, keys=bank.keys.clone(), values=bank.values.clone())
    for row, padding in enumerate((0, 9)):
        spoiled.keys[:, row, :, padding : padding + policy.sinks] *= 50
    sides = [PolicyStore(policy, state, one, state.lengths.tokens).sides for one in (bank, spoiled)]
    assert len(sides[0]) == 7  # three steps of two chains of keys, and the rotation of values
    for steps, side in sides[0].items():
        assert all(torch.equal(tensor, sides[1][steps][name]) for name, tensor in side.items())
    counted = PolicyStore(replace(policy, sinks=0), state, spoiled, state.lengths.tokens).sides
    assert any(not torch.equal(t, counted[steps][name]) for steps, side in sides[0].items() for name, t in side.items())


@dataclass(frozen=True)
class Probe(Transform):
    """Keeps what it is told of the queries; does nothing."""

    order = 9

    def fit(self, sample: Sample) -> Side:
        assert sample.queries is not None
        return {"told": sample.queries.absmax}

    def apply(self, x: torch.Tensor, side: Side, where: Where) -> torch.Tensor:
        return x

    undo = apply

    def query(self, q: torch.Tensor, side: Side) -> torch.Tensor:
        return q


def test_a_step_is_told_of_the_queries_as_the_steps_before_it_leave_them() -> None:
    policy = Policy("probe", "probe", (Tier(key=["balance", Probe(), "affine4"], value=4),))
    run = engine()
    state = run.prefill([tokens(30)])
    store = PolicyStore(policy, state, state.banks[0], state.lengths.tokens)
    sides = {len(steps): side for (_, steps), side in store.sides.items()}
    assert torch.equal(sides[2]["told"], state.banks[0].query_absmax / sides[1]["balancer"])
    assert not torch.equal(sides[2]["told"], state.banks[0].query_absmax)


def test_the_lowest_of_many_are_the_lowest_one_by_one() -> None:
    """Ties go to the earliest token, whatever the slot it is in."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(0, 6, (3, 2, 4, 30), generator=generator).double()
    positions = torch.rand(3, 2, 4, 30, generator=generator).argsort(dim=-1)
    together = lowest(value, positions, 7)
    left = value.clone()
    for i in range(7):
        one = lowest(left, positions, 1)
        assert torch.equal(one, together[..., i : i + 1])
        left.scatter_(-1, one, torch.inf)


def tier_store(count: torch.Tensor, slots: int) -> TierStore:
    """A 16-bit tier of 1 x 1 x heads whose tokens are told by their positions."""
    heads = count.shape[2]
    positions = torch.arange(slots).expand(1, 1, heads, slots)
    keys = positions[..., None].expand(1, 1, heads, slots, 16).half()
    return TierStore(Tier(16), {}, [Pairs(keys, -keys, positions, None)], count, torch.float16, "stored", with_scores=False)


@pytest.mark.parametrize("seed", range(40))
def test_slots_after_any_exchange_hold_what_they_should(seed: int) -> None:
    """Any number comes and goes in each head: nothing is lost, nothing doubled, everything lies in front."""
    generator = torch.Generator().manual_seed(seed)
    heads, slots, many = 5, 9, 4
    count = torch.randint(0, slots + 1, (1, 1, heads), generator=generator)
    store = tier_store(count, slots)
    arriving = torch.randint(0, many + 1, (1, 1, heads), generator=generator)
    leaving = count + arriving  # at most
    leaving = (torch.rand(leaving.shape, generator=generator) * (leaving + 1)).long()
    leaving = leaving.clamp(max=6)
    new = (100 + torch.arange(many)).expand(1, 1, heads, many)
    vectors = new[..., None].expand(1, 1, heads, many, 16).half()
    store.reserve(many)
    most = max(1, int(leaving.max()))
    chosen = torch.zeros(1, 1, heads, most, dtype=torch.long)
    wanted, gone = [], []
    for head in range(heads):
        here = [*range(int(count[0, 0, head])), *(store.slots + torch.arange(int(arriving[0, 0, head]))).tolist()]
        order = [here[i] for i in torch.randperm(len(here), generator=generator).tolist()]
        out = order[: int(leaving[0, 0, head])]
        chosen[0, 0, head, : len(out)] = torch.tensor(out, dtype=torch.long)
        named = {slot: slot if slot < store.slots else 100 + slot - store.slots for slot in here}
        wanted.append({named[slot] for slot in here if slot not in out})
        gone.append([named[slot] for slot in out])
    done = store.exchange(Pairs(vectors, -vectors, new, None), arriving, leaving, chosen if leaving.any() else None)
    keys, values = store.read()
    for head in range(heads):
        used = int(store.count[0, 0, head])
        held = store.positions()[0, 0, head, :used].tolist()
        assert used == len(wanted[head])
        assert set(held) == wanted[head]
        assert keys[0, 0, head, :used, 3].tolist() == held
        assert values[0, 0, head, :used, 5].tolist() == [-p for p in held]
        if gone[head]:
            assert done.taken.positions[0, 0, head, : len(gone[head])].tolist() == gone[head]
            assert done.taken.keys[0, 0, head, : len(gone[head]), 0].tolist() == gone[head]
        for i in range(int(arriving[0, 0, head])):
            stays = 100 + i in wanted[head]
            assert bool(done.stored[0, 0, head, i]) == stays
            assert not stays or store.positions()[0, 0, head, done.slots[0, 0, head, i]] == 100 + i


def context(scores: torch.Tensor, seen: list[int], **parts: Any) -> Context:
    """Of the prompts whose scores [L, B, H, T] are given, left-padded to T."""
    layers, _, _, columns = scores.shape
    lengths = torch.tensor(seen)
    positions = (torch.arange(columns) - (columns - lengths)[:, None])[None, :, None].expand(scores.shape)
    vectors = torch.zeros(*scores.shape, 64)
    defaults = {"total_layers": layers, "protected": torch.zeros(scores.shape, dtype=torch.bool)}
    return Context(
        layers=torch.arange(layers), prompts=lengths, positions=positions, seen=lengths, prompt_lengths=lengths,
        keys=vectors, values=vectors, **{**defaults, **parts},
    )  # fmt: skip


def test_amounts_are_numbers_and_shares_together() -> None:
    budget = Amounts((0.0, 0.25), (4, 2))
    assert [c.tolist() for c in budget.counts(torch.tensor([0, 10, 100]))] == [[4, 4, 4], [6, 8, 31]]
    assert Amounts((0.5,), of="prompt").grows is False


@pytest.mark.parametrize("size", [0.05, 0.2, 0.3, 0.5, 0.99, 2.0])
def test_a_budget_of_bytes_is_filled_to_the_last_token(size: float) -> None:
    """Counted from what is stored: no more than was allowed, and one token more in the better tier would be too much."""
    policy = replace(mikv(), budget=Bytes(size))
    run = engine()
    state = run.prefill([tokens(150), tokens(90, seed=1)], {Accumulated().observer})
    (store,) = run.compress(state, [policy]).banks[0].stores
    heads = store._per_row
    high, low = store._costs[0]
    for b, seen in enumerate((150, 90)):
        held = float(sum(part[b] for part in store.nbytes().values())) / heads
        kept, full = int(store.tiers[0].count[0, b, 0]), 4 * 16 * seen
        smallest = seen * low + store._costs[1]
        assert held <= max(size * full, smallest)
        assert kept == seen or held + high - low > size * full
        assert 0 < kept < seen or size not in (0.5,)


def test_layers_may_have_other_factors() -> None:
    scores = torch.rand(3, 2, 2, 40)
    quotas = PerLayer(Amounts((0.5,)), (1.5, 1.0, 0.1)).quotas(None, context(scores, [40, 21]))
    assert quotas.shape == (1, 3, 2, 1)
    assert quotas[0, :, :, 0].tolist() == [[30, 15], [20, 10], [2, 1]]
    with pytest.raises(ValueError, match="2 factors for a model of 3 layers"):
        PerLayer(Amounts((0.5,)), (1.0, 1.0)).quotas(None, context(scores, [40, 21]))


def test_heads_share_by_their_scores_and_none_goes_without() -> None:
    """The same tokens as a sort over all heads of a layer would keep; the sum is the layer's; padding counts nothing."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 2, 3, 40, generator=generator)
    scores[:, :, 1] += 5  # one head has it all
    seen = [40, 25]
    quotas = AcrossHeads(Amounts((0.3,)), least=0.25).quotas(scores, context(scores, seen))[0]
    for layer, row in product(range(2), range(2)):
        each = int(0.3 * seen[row])
        sure = each // 4
        assert quotas[layer, row].sum() == 3 * each
        assert (quotas[layer, row] >= sure).all()
        assert quotas[layer, row].tolist() == [
            sure,
            3 * each - 2 * sure if 3 * each - 2 * sure < seen[row] else seen[row],
            sure,
        ]
    protected = torch.zeros(scores.shape, dtype=torch.bool)
    protected[..., -4:] = True  # of all heads
    quotas = AcrossHeads(Amounts((0.3,)), least=0.0).quotas(scores, context(scores, seen, protected=protected))[0]
    assert (quotas >= 4).all()
    with pytest.raises(ValueError, match="no importance"):
        AcrossHeads(Amounts((0.3,))).quotas(None, context(scores, seen))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bytes(0), "above 0"),
        (lambda: Amounts((0.2,), (1, 2)), "one of each per tier"),
        (lambda: Amounts((0.2,), (-1,)), "0 or more"),
        (lambda: AcrossHeads(Amounts((0.2,)), 2), "no ratio"),
        (lambda: Policy("p", "p", (Tier(key="channel2", value=2), Tier(0)), Amounts((0.5,))), "none of them can leave"),
        (lambda: Policy("p", "p", (Tier(key="channel2", value=2),)), "needs a 16-bit tier above"),
        (lambda: Policy("p", "p", (Tier(16),), window_tier=1), "its tiers are 0 to 0"),
        (lambda: Policy("p", "p", (Tier(16),), every=-1), "not negative"),
        (lambda: Policy("p", "p", (Tier(16), Tier(4), Tier(2)), Bytes(0.5)), "3 tiers, and a budget for 2"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_window_of_queries_behind_a_shared_prefix_in_a_padded_batch() -> None:
    """The last W queries, whichever of them a prefix holds: as if each prompt had been prefilled alone and whole."""
    from mikv.importance.scores import ColumnSums

    observer, prefix = ColumnSums(last=16), tokens(60, seed=9)
    run = engine()
    prompts = [[*prefix, *tokens(5, seed=1)], [*prefix, *tokens(31, seed=2)]]
    alone = [run.prefill([p], {observer}).banks[0].observed[observer] for p in prompts]
    for shared in (0, 60):
        run.forget_prefix()
        together = run.prefill(prompts, {observer}, shared=shared).banks[0].observed[observer]
        for row, (prompt, wanted) in enumerate(zip(prompts, alone, strict=True)):
            got = together[:, row, :, -len(prompt) :]
            torch.testing.assert_close(got, wanted[:, 0], rtol=0, atol=1e-4)
    # and it is what the definition says: 16 queries' probabilities, two query heads a group
    torch.testing.assert_close(alone[1].sum(dim=-1), torch.full((2, 1, 2), 32.0), rtol=1e-4, atol=0)
    whole = run.prefill([prompts[1]], {ColumnSums()}).banks[0].observed[ColumnSums()]
    assert (whole >= alone[1] - 1e-5).all()
    assert (whole[..., 0] > alone[1][..., 0] + 1).all()
