"""Our own policy against its equations, one vector at a time; and the finding that it answers: large key biases."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from conftest import NO_END, engine, model, tokens
from torch import Tensor

from mikv.budget import Amounts
from mikv.config import ConfigError, policy
from mikv.engine import Engine
from mikv.engine.requests import Prompt, Scoring
from mikv.importance.scores import ColumnSums
from mikv.models.architecture import rope_inv_freq
from mikv.models.tiny import tiny_config, tiny_model
from mikv.policy import Policy
from mikv.quant.tier import Tier
from mikv.whiten import whiten

ALONE = {"window": 0, "keep": 0.0, "code": "codebook"}  # each token by itself, each channel by itself
CENTROIDS = {2: (-1.510, -0.4528, 0.4528, 1.510), 3: (-2.152, -1.344, -0.7560, -0.2451, 0.2451, 0.7560, 1.344, 2.152)}


def turned(x: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """RoPE at a position, by the half-and-half convention of transformers."""
    half = len(inv_freq)
    angle = position * inv_freq
    first, second = x[:half], x[half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()))


def sylvester(x: Tensor) -> Tensor:
    """H x / sqrt(D), element by element: H_ij = (-1)^(number of ones that i and j share)."""
    n = len(x)
    return torch.stack([sum((-1) ** (i & j).bit_count() * x[j] for j in range(n)) for i in range(n)]) / math.sqrt(n)


def coded(y: Tensor, bits: int) -> Tensor:
    norm = y.norm()
    nearest = torch.tensor([min(CENTROIDS[bits], key=lambda c: abs(c - float(x))) for x in y * math.sqrt(len(y)) / norm])
    return norm * nearest / nearest.norm()


def as_read(keys: Tensor, queries: Tensor, positions: range, inv_freq: Tensor, bits: int, sinks: int = 4) -> Tensor:
    """Keys [T, D] of one head as the equations read them back; queries [Q, D] of its group."""
    counting = [i for i, p in enumerate(positions) if p >= sinks]
    mean = torch.stack([turned(keys[i], -positions[i], inv_freq) for i in counting]).mean(0).half().float()
    rest = torch.stack([keys[i] - turned(mean, positions[i], inv_freq) for i in range(len(keys))])
    b = (queries.square().mean(0) / rest[counting].square().mean(0)) ** 0.25
    b = b.half().float()
    read = [sylvester(coded(sylvester(b * u), bits)) / b for u in rest]
    return torch.stack([k + turned(mean, p, inv_freq) for k, p in zip(read, positions, strict=True)])


def alike(read: Tensor, wanted: Tensor) -> list[bool]:
    """Which vectors [n, D] are the same up to the rounding of FP16 norms."""
    return [bool((x - y).abs().max() < 5e-3 * y.abs().max()) for x, y in zip(read, wanted, strict=True)]


@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 16), (8, 1, 16), (4, 2, 64)])
def test_what_is_read_is_what_the_equations_say(
    query_heads: int, kv_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of a padded batch, every layer and head: the sinks exact, all others by the slow way."""
    from mikv.cache import prefill

    queries: list[Tensor] = []
    attend = prefill.causal_attention
    monkeypatch.setattr(prefill, "causal_attention", lambda query, *rest: (queries.append(query), attend(query, *rest))[1])
    shape = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim, "hidden_size": 16 * query_heads}
    run = Engine(model(**shape), NO_END, 257)
    lengths = (21, 13)
    state = run.prefill([tokens(length, seed=length) for length in lengths], {ColumnSums()})  # an observer sees all
    (bank,) = state.banks
    store = run.compress(state, [whiten("k3v2", **ALONE)]).banks[0].stores[0]
    inv_freq = rope_inv_freq(run.model)
    assert inv_freq is not None
    group = query_heads // kv_heads
    close: list[bool] = []
    (sunk, _, exact, exact_values), (positions, used, keys, values) = store.read()
    for layer in range(len(bank.keys)):
        for row, length in enumerate(lengths):
            first = lengths[0] - length
            for head in range(kv_heads):
                place = (layer, row, head)
                assert positions[place][used[place]].tolist() == list(range(4, length))
                assert sunk[place].tolist() == list(range(4))
                mine, real = bank.keys[place][first:], bank.values[place][first:]
                assert torch.allclose(exact[place], mine[:4], atol=2e-3)
                assert torch.allclose(exact_values[place], real[:4], atol=2e-3)
                asked = queries[layer][row, head * group : (head + 1) * group, -length:].flatten(0, 1)
                wanted = as_read(mine, asked, range(length), inv_freq, bits=3)[4:]
                close += alike(keys[place][used[place]], wanted)
                of_values = torch.stack([sylvester(coded(sylvester(v), 2)) for v in real[4:]])
                close += alike(values[place][used[place]], of_values)
    assert sum(close) / len(close) > 0.97  # a number at the edge of two codes may go either way


def biased(size: float) -> Any:
    """A tiny model whose keys have large biases in a few channels, as Qwen2.5's."""
    shape = {"query_heads": 4, "kv_heads": 2, "head_dim": 64, "hidden_size": 64}
    made = tiny_model(tiny_config("qwen2", **shape), torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in made.model.layers:
            bias = layer.self_attn.k_proj.bias
            channels = torch.randperm(len(bias), generator=generator)[: len(bias) // 16]
            bias[channels] = size * torch.randn(len(channels), generator=generator).sign()
    return made


def divergences(size: float, policies: list[Policy]) -> list[tuple[float, float]]:
    """Mean KL from the full cache over some continuations, and how far the worst layer's attention is moved."""
    asked = [Scoring(Prompt(tokens(200, seed=s), [7]), [tokens(24, seed=50 + s)]) for s in range(3)]
    run = Engine(biased(size), NO_END, 257)
    run.measuring = True
    scores = run.score(asked, [policy("full"), *policies])
    kl = [sum(s.continuations[0].fidelity.kl for s in of_policy) / len(asked) for of_policy in scores[1:]]
    return list(zip(kl, [max(s.worst_layer[1] for s in of_policy if s.worst_layer) for of_policy in scores[1:]], strict=True))


def test_large_key_biases_ruin_uniform_quantization_and_not_this() -> None:
    """The reason why quantized caches break on Qwen2.5: the biases eat the range of every scale. Centring takes them out."""
    panel = [policy("uniform", {"tier.bits": 4, "balance": True}), whiten("k4v3", **ALONE)]
    panel.append(whiten("k4v3", **ALONE, centre="none"))
    for before, biased_now, what in zip(divergences(0.0, panel), divergences(40.0, panel), panel, strict=True):
        for one, other in zip(before, biased_now, strict=True):  # the divergence, and the worst layer's attention
            if what is panel[1]:
                assert other < 1.5 * one
            else:
                assert other > 1.7 * one
    uniform, ours = divergences(40.0, panel[:2])
    assert ours[0] < uniform[0] / 1.5  # at fewer bytes
    assert ours[1] < uniform[1] / 1.5


def test_a_new_token_is_coded_at_once_or_waits_in_the_window() -> None:
    run = engine()
    for window, waiting in ((0, [0, 12]), (8, [8, 4])):
        cache = run.compress(run.prefill([tokens(14)]), [whiten(2, window=window, keep=0.0)])
        for step in range(2):
            run.step(cache, torch.tensor([step]), torch.tensor([14 + step]), torch.tensor([True]))
        (store,) = cache.banks[0].stores
        counts = [int(tier.count[0, 0, 0]) for tier in store.tiers]
        assert counts == ([4, *waiting] if window else [4, waiting[1]])
        positions, used = store.tiers[-1].positions()[0, 0, 0], store.tiers[-1].used()[0, 0, 0]
        assert positions[used].tolist() == list(range(4, 16 - window))


@pytest.mark.parametrize("extra", [0.0, 0.5])
@pytest.mark.parametrize("lengths", [(41, 60), (30, 5), (1, 2)])
def test_important_tokens_are_chosen_once_and_all_other_positions_follow(extra: float, lengths: tuple[int, int]) -> None:
    """Of a padded batch, step by step, also where a prompt fills no tier: those of the prompt that its last queries attended
    most, in each head its own; no score is stored, and of those that go down no position."""
    run = engine()
    made = whiten(2, extra=extra, window=6, keep=0.1)
    observer = ColumnSums(32)
    state = run.prefill([tokens(length, seed=length) for length in lengths], made.observers)
    observed = state.banks[0].observed[observer]
    cache = run.compress(state, [made])
    for step in range(1, 16):
        active = torch.tensor([True, step < 9])
        at = torch.tensor([lengths[0] + step - 1, lengths[1] + min(step, 9) - 1])
        run.step(cache, torch.tensor([step, 3 * step]), at, active)
        (store,) = cache.banks[0].stores
        for row, length in enumerate(lengths):
            seen = length + (step if row == 0 else min(step, 8))
            for place in product(range(2), [row], range(2)):
                tiers = [tier.positions()[place][: int(tier.count[place])].tolist() for tier in store.tiers]
                free = range(4, length - 6)  # of the prompt, neither a sink nor one of the last
                mass = observed[place][max(lengths) - length :]
                best = sorted(free, key=lambda i: (-float(mass[i]), -i))[: length // 10]
                kept = sorted(tiers[1])
                assert kept == sorted(best)
                last = [p for p in range(seen) if p >= 4 and p not in kept][-(6 + length // 10 - len(kept)) :]
                assert sorted(tiers[0]) == list(range(min(4, seen)))
                assert sorted(tiers[2]) == last
                rest = [p for p in range(4, seen) if p not in kept and p not in last]
                assert [p for tier in tiers[3:] for p in tier] == rest  # in one tier, in this order
    usage = cache.usage()
    held = [sum(int(tier.count[:, row].sum()) for tier in store.tiers[:3]) for row in range(2)]
    assert [u.nbytes["positions"] for u in usage] == [4 * n for n in held]
    assert not any("scores" in u.nbytes for u in usage)


def test_a_part_of_a_batch_goes_on_with_its_own_positions() -> None:
    run = engine()
    made = whiten(2, window=6, keep=0.1)
    state = run.prefill([tokens(60), tokens(50, seed=1), tokens(40, seed=2)], made.observers)
    (store,) = run.compress(state, [made]).banks[0].stores
    before = store.tiers[-1].positions().clone()
    rows = torch.tensor([2, 0])
    forked = store.fork(rows)
    assert torch.equal(forked.tiers[-1].positions(), before[:, rows])
    store.select(rows)
    assert torch.equal(store.tiers[-1].positions(), before[:, rows])


def test_positions_cost_nothing_where_they_follow_from_the_order() -> None:
    """All heads take the same tokens in the same order; with important ones above; not where a new token may be important."""
    run = engine()
    state = run.prefill([tokens(60)], {ColumnSums(32)})
    ways = [whiten(window=0, keep=0.0), whiten(window=5, keep=0.0), whiten(window=5, keep=0.2), whiten(window=0, keep=0.2)]
    stored = [run.compress(state, [one]).usage()[0].nbytes["positions"] for one in ways]
    heads = 2 * 2
    assert stored == [4 * 4 * heads, 4 * 5 * heads, 4 * (4 + 12 + 5) * heads, 4 * 60 * heads]


@pytest.mark.parametrize("options", [{}, {"keep": 0.1}, {"window": 0}, {"extra": 0.5}])
def test_which_tier_holds_a_stretch_is_known_without_stored_positions(options: dict[str, Any]) -> None:
    run = engine("kernel")  # no dense copy that would want positions
    made = whiten(**{"window": 6, "keep": 0.0, **options})
    store = run.compress(run.prefill([tokens(40)], made.observers), [made]).banks[0].stores[0]
    held = store.held(torch.tensor([2]), torch.tensor([40]))
    heads, waiting = 2 * 2, 6 if made.window else 0
    assert sum(int(part) for part in held.values()) == 38 * heads
    assert int(held["16"]) == 2 * heads
    assert int(held.get("5", torch.tensor(0))) == waiting * heads
    assert store.tiers[0].positions()[0, 0, 0, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, 4),
        ({"sinks": 0}, 0),
        ({"window": 0}, None),
        ({"window": 0, "keep": 0.0}, 4),
        ({"extra": 0.5}, 4),
        ({"importance": "random"}, 4),
        ({"window": 0, "importance": "recency"}, 4),
    ],
)
def test_which_policies_take_tokens_in_order(options: dict[str, Any], first: int | None) -> None:
    made = whiten(**options)
    assert made.in_order(len(made.tiers) - 1) == first


def test_what_is_important_is_settled_only_where_a_window_of_its_own_lies_right_above_the_rest() -> None:
    made = whiten()
    assert made.settled
    assert not made.scored
    assert not whiten(window=0).settled
    for budget in (
        Amounts((0.0, 0.02, 0.0), (4, 0, 32)),  # a share of what was seen
        Amounts((0.0, 0.02, 0.0), (4, 0, 33), "prompt"),
        Amounts((0.0, 0.02, 0.1), (4, 0, 32), "prompt"),
    ):
        assert not replace(made, budget=budget).settled
    assert not replace(made, window_tier=1).settled
    assert replace(made, window_tier=1).scored


def test_sinks_without_room_are_not_known_to_stay() -> None:
    tight = replace(whiten(window=0, keep=0.0), budget=Amounts((0.0,), (3,)))
    assert tight.in_order(1) is None


def test_bits_by_head_go_up_to_the_largest_codebook() -> None:
    assert [str(tier) for tier in whiten(4, extra=0.5).tiers[3:]] == ["k5v4", "4"]
    assert [str(tier) for tier in whiten("k3v2", extra=0.5).tiers[3:]] == ["k5v2", "k4v2", "k3v2"]
    with pytest.raises(ValueError, match=r"extra=1\.5: bits of keys, between 0 and 1"):
        whiten(4, extra=1.5)
    for low in (5, 8, 16, Tier(key=["rotate", "codebook2"], value=2)):
        with pytest.raises(ValueError, match="whose keys are given by their bits, 1 to 4"):
            whiten(low, extra=0.5)


def test_tiers_are_ordered_by_their_bits_and_a_step_can_be_left_out() -> None:
    made = whiten("k3v2", newest=5, keep=0.1, importance="accumulated")
    assert [str(tier) for tier in made.tiers] == ["16", "8", "5", "k3v2"]
    assert made.window_tier == 2
    assert str(whiten(2, centre="none", balance="max", rotate=False, code="codebook").tiers[-1].key) == "balance > codebook2"
    assert str(whiten(Tier(key="affine3", value=4)).tiers[-1].value) == "rotate > trellis4"
    assert len(whiten(newest=16, keep=0.0).tiers) == 2
    with pytest.raises(ValueError, match="tiers 4 and 5"):
        whiten(high=4)
    with pytest.raises(ConfigError, match="choose accumulated or per_query or late or recency or random"):
        policy("whiten", {"importance": "attention"})


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "whiten 2"),
        ({"low": "k3v2", "extra": 0.5}, "whiten k3v2+0.5"),
        ({"window": 8, "newest": 4, "keep": 0.01, "high": 5}, "whiten 2 last 8 4 1% late 5"),
        ({"keep": 0.0, "window": 0, "sinks": 0}, "whiten 2 no window none important sinks=0"),
        ({"importance": "random", "code": "codebook"}, "whiten 2 2% random 8 code=codebook"),
    ],
)
def test_a_label_says_what_is_not_the_default(options: dict[str, Any], label: str) -> None:
    assert whiten(**options).label == label
