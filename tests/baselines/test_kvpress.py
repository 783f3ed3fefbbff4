"""A press of kvpress in the project's store, by a stand-in for the library: the tokens that its score prefers are what is kept,
in batches with padding; what can't be done is refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import engine, tokens

from baselines import kvpress as wrapped
from mikv.config import ConfigError, policy
from mikv.engine import Engine
from mikv.policy import Policy


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_in"))
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    wrapped._class.cache_clear()
    yield
    wrapped._class.cache_clear()
    sys.modules.pop("kvpress", None)


def kept(run: Engine, one: Policy, prompts: list[list[int]], shared: int = 0) -> list[list[list[set[int]]]]:
    """Positions that are kept, by prompt, layer and head."""
    cache = run.compress(run.prefill(prompts, one.observers, shared), [one])
    (store,) = cache.banks[0].stores
    positions, used = store.tiers[0].positions(), store.tiers[0].used()
    layers, rows, heads, _ = positions.shape
    used = used.expand(positions.shape)
    return [
        [
            [set(positions[layer, row, head][used[layer, row, head]].tolist()) for head in range(heads)]
            for layer in range(layers)
        ]
        for row in range(rows)
    ]


@pytest.mark.parametrize(("press", "ours"), [("KnormPress", "knorm"), ("QueryPress", "tova")])
def test_a_press_keeps_what_our_policy_of_the_same_score_keeps(press: str, ours: str) -> None:
    run, prompts = engine(query_heads=8, kv_heads=2), [tokens(50), tokens(31, seed=1), tokens(7, seed=2)]
    theirs = kept(run, policy("kvpress", {"press": press, "keep": 0.4}), prompts)
    assert theirs == kept(run, policy(ours, {"keep": 0.4}), prompts)
    assert len(theirs[0][0][0]) == 20
    assert not any("rotary_emb" in vars(layer.self_attn) for layer in run.model.model.layers)


def test_options_reach_the_press_and_are_in_its_name_and_identity() -> None:
    run, prompts = engine(), [tokens(40)]
    plain, other = (policy("kvpress", {"press": "QueryPress", "options": options}) for options in (None, {"sign": -1.0}))
    assert kept(run, plain, prompts) != kept(run, other, prompts)
    assert plain.identity() != other.identity()
    assert (plain.label, other.label) == ("QueryPress 20%", "QueryPress 20% sign=-1.0")


def test_a_press_knows_how_much_is_evicted() -> None:
    (found,) = kept(engine(), policy("kvpress", {"press": "RatioPress", "keep": 0.25}), [tokens(40)])
    assert all(head == {0, *range(31, 40)} for layer in found for head in layer)


def test_prompts_that_begin_alike_are_seen_whole() -> None:
    run, one = engine(), policy("kvpress", {"press": "QueryPress", "keep": 0.5})
    prompts = [tokens(30) + tokens(9, seed=1), tokens(30) + tokens(5, seed=2)]
    assert kept(run, one, prompts, shared=30) == kept(run, one, prompts)


@pytest.mark.parametrize(
    ("press", "options", "said"),
    [
        ("MaskPress", None, "no scorer press"),
        ("ScorerPress", None, "no scorer press"),
        ("Nothing", None, "KnormPress, QueryPress"),
        ("no.such.module.Press", None, "no module named"),
        ("QueryPress", {"colour": 1}, "colour"),
    ],
)
def test_what_is_no_press_is_refused(press: str, options: dict[str, int] | None, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy("kvpress", {"press": press, "options": options})
    assert said in str(caught.value) or said in str(caught.value).lower()


def test_a_press_that_wants_attention_weights_says_so() -> None:
    run, one = engine(), policy("kvpress", {"press": "EagerPress"})
    with pytest.raises(ValueError, match="attention weights, please"):
        run.prefill([tokens(20)], one.observers)


def test_without_the_library_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapped, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install --no-deps kvpress"):
        policy("kvpress")


def test_a_press_sees_no_padding() -> None:
    """Each prompt of a batch is scored as alone, to the last digit of what the keys allow."""
    run, one = engine(), policy("kvpress", {"press": "KnormPress"})
    (observer,) = one.observers
    prompts = [tokens(50), tokens(20, seed=1)]
    both = run.prefill(prompts, one.observers).banks[0].observed[observer]
    alone = run.prefill(prompts[1:], one.observers).banks[0].observed[observer]
    assert torch.allclose(both[:, 1:, :, 30:], alone, atol=1e-4)
    assert (both[:, 1, :, :30] == 0).all()
