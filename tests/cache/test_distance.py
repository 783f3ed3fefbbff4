"""The distance of attention, against loops over tokens; and what it says of policies that are known to be off."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import NO_END, engine, model, named_policy, tokens
from torch import Tensor

from mikv.cache.distance import attention_distance, worst_layers
from mikv.config import compose, policy
from mikv.engine import Engine
from mikv.engine.requests import Prompt, Request, Scoring
from mikv.policy import Policy
from mikv.runner import execute

LENGTHS = (37, 20, 3, 1)


def softmax(logits: dict[int, float]) -> dict[int, float]:
    top = max(logits.values())
    powers = {t: 2.718281828459045 ** (x - top) for t, x in logits.items()}
    return {t: x / sum(powers.values()) for t, x in powers.items()}


def slow(run: Engine, one: Policy, layer: int, row: int) -> float:
    """One query, one head, one token at a time, from a store whose positions are all kept."""
    state = run.prefill([tokens(n, seed=n) for n in LENGTHS], one.observers)
    (bank,) = state.banks
    store = run.compress(state, [one]).banks[0].stores[0]
    length, padding = LENGTHS[row], LENGTHS[0] - LENGTHS[row]
    found: list[float] = []
    heads, group, last = bank.last_queries.shape[2:5]
    for head, member, place in product(range(heads), range(group), range(last)):
        asking = length - last + place
        if asking <= 0:
            continue
        query = bank.last_queries[layer, row, head, member, place].float() / bank.keys.shape[-1] ** 0.5
        exact = {t: float(query @ bank.keys[layer, row, head, padding + t].float()) for t in range(asking + 1)}
        kept: dict[int, float] = {}
        for positions, used, keys, _ in store.read():
            for slot in used[layer, row, head].nonzero().flatten().tolist():
                at = int(positions[layer, row, head, slot])
                if at <= asking:
                    kept[at] = float(query @ keys[layer, row, head, slot])
        p, stored = softmax(exact), softmax(kept) if kept else {}
        found.append(sum(abs(stored.get(t, 0.0) - p[t]) for t in p) / 2)
    return sum(found) / len(found) if found else 0.0


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("name", ["mikv", "h2o", "uniform", "whiten", "blocks", "pyramid", "adakv"])
def test_the_distance_is_that_of_loops(name: str, query_heads: int, kv_heads: int) -> None:
    """A padded batch, prompts shorter than what is watched among them; also where a store does not know all positions."""
    shape = {"query_heads": query_heads, "kv_heads": kv_heads, "hidden_size": 16 * query_heads}
    one = named_policy(name)
    run = Engine(model(**shape), NO_END, 257)
    packed = Engine(model(**shape), NO_END, 257, "packed")
    state = run.prefill([tokens(n, seed=n) for n in LENGTHS], one.observers)
    tracked, untracked = (
        attention_distance(some.compress(state, [one]).banks[0].stores[0], state.banks[0], state.lengths)
        for some in (run, packed)
    )
    assert torch.equal(tracked, untracked)
    assert tracked.shape == (2, len(LENGTHS))
    for layer, row in product(range(2), range(len(LENGTHS))):
        assert float(tracked[layer, row]) == pytest.approx(slow(run, one, layer, row), abs=1e-4)


def test_what_is_evicted_is_the_attention_that_it_had() -> None:
    """The rest is exact, and shares what the evicted tokens had."""
    run, one = engine(), policy("h2o", {"keep": 0.3})
    state = run.prefill([tokens(40)], one.observers)
    (bank,) = state.banks
    store = run.compress(state, [one]).banks[0].stores[0]
    last = bank.last_queries.shape[4]
    got = attention_distance(store, bank, state.lengths)
    query = bank.last_queries[:, 0].float() / bank.keys.shape[-1] ** 0.5
    logits = query @ bank.keys[:, 0].float().transpose(-1, -2).unsqueeze(2)
    future = torch.arange(40) > torch.arange(40 - last, 40)[:, None]
    p = torch.softmax(logits.masked_fill(future, -torch.inf), dim=-1)
    held = torch.zeros(*bank.keys.shape[:1], *bank.keys.shape[2:4], dtype=torch.bool)
    held.scatter_(2, store.tiers[0].positions()[:, 0], True)
    gone: Tensor = (p * ~held[:, :, None, None]).sum(dim=-1)
    assert torch.allclose(got[:, 0], gone.mean(dim=(1, 2, 3)), atol=2e-3)


def test_behind_a_shared_prefix_the_distance_is_the_same() -> None:
    shared = tokens(30, seed=9)
    contexts = [[*shared, *tokens(n, seed=n)] for n in (20, 31)]
    run, one = engine(), policy("mikv")
    whole, forked = run.prefill(contexts, one.observers), run.prefill(contexts, one.observers, shared=30)
    for mine, other in zip(*(worst_layers(run.compress(state, [one]), state)[0] for state in (whole, forked)), strict=True):
        assert mine == (other[0], pytest.approx(other[1], abs=1e-3))


def test_every_response_tells_its_worst_layer_and_16_bits_have_none() -> None:
    panel = [policy("full"), policy("h2o", {"keep": 0.1}), policy("uniform", {"tier.bits": 1})]
    run = engine()
    run.measuring = True
    scores = run.score([Scoring(Prompt(tokens(60), [7]), [[1, 2]])], panel)
    (full,), (evicting,), (coarse,) = scores
    assert full.worst_layer == (0, 0.0)
    assert all(one.worst_layer is not None and 0.1 < one.worst_layer[1] <= 1 for one in (evicting, coarse))


def test_a_run_measures_its_first_batch() -> None:
    """It costs a look at all that is stored."""
    run, panel = engine(), [policy("full"), policy("mikv")]
    requests: dict[int, list[Request]] = {i: [Scoring(Prompt(tokens(60, seed=i), [7]), [[1, 2]])] for i in range(5)}
    for _ in range(2):
        told = [[one.responses[1][0].worst_layer is not None for one in some] for some in run.serve(requests, panel, 2, False)]
        assert told == [[True] * 2, [False] * 2, [False]]
    assert run.score([Scoring(Prompt([1, 2], [3]), [[4]])], panel)[1][0].worst_layer is None


def test_a_policy_that_is_badly_off_is_warned_of_with_its_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(compose("model=tiny-random", "policy=h2o", "policy.keep=0.05", "task.lines=6", "task.limit=2", f"out={tmp_path}"))
    assert "warning: h2o 5%: in layer " in capsys.readouterr().out
    execute(compose("model=tiny-random", "policy=mikv", "policy.low.bits=8", "task.lines=6", "task.limit=2", f"out={tmp_path}"))
    assert "warning" not in capsys.readouterr().out
