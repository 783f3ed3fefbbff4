"""Budgets, ranks and what a policy refuses."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import torch

from baselines.h2o import h2o
from baselines.streaming_llm import streaming_llm
from mikv.assignment import assign
from mikv.budget import Amounts
from mikv.importance.scores import Accumulated
from mikv.mikv import mikv
from mikv.policy import Policy
from mikv.quant.tier import Tier


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.2, 0.29, 0.57, 1 / 3, 1.0])
def test_quotas_are_exact(keep: float) -> None:
    """floor(0.29 * 100) is 29, not the 28 of floating point (trap T7: ratio -> tokens, for every length)."""
    lengths = torch.arange(0, 2000)
    budget = mikv(keep=keep).budget
    assert isinstance(budget, Amounts)
    (quota,) = budget.counts(lengths)
    assert quota.tolist() == [int(Fraction(str(keep)) * n) for n in range(2000)]


def assigned(policy: Policy, scores: list[float], length: int | None = None) -> list[int]:
    """Tiers of one head's tokens; length below the number of scores = left padding."""
    length = len(scores) if length is None else length
    positions = torch.arange(len(scores)) - (len(scores) - length)
    seen = torch.tensor([length])
    assert isinstance(policy.budget, Amounts)
    quotas = torch.stack(policy.budget.counts(seen))[:, None, :, None]
    tiers = assign(policy, torch.tensor(scores)[None, None, None], positions[None, None, None], seen, quotas)
    return tiers[0, 0, 0].tolist()


def test_half_heavy_hitters_half_recent() -> None:
    assert assigned(h2o(keep=0.4), [1, 9, 2, 8, 3, 7, 4, 1, 2, 0]) == [1, 0, 1, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(("recent", "kept"), [(0.0, [1, 3, 5, 6]), (0.25, [1, 3, 5, 9]), (1.0, [6, 7, 8, 9])])
def test_the_recent_share_is_kept_whatever_it_scores(recent: float, kept: list[int]) -> None:
    tiers = assigned(h2o(keep=0.4, recent=recent), [1, 9, 2, 8, 3, 7, 4, 1, 2, 0])
    assert [i for i, tier in enumerate(tiers) if tier == 0] == kept


def test_sinks_and_a_window() -> None:
    assert assigned(streaming_llm(keep=0.6, sinks=4), [0.0] * 10) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert assigned(streaming_llm(keep=0.2, sinks=4), [0.0] * 10) == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]  # the budget goes first


def test_ties_go_to_the_later_token() -> None:
    assert assigned(h2o(keep=0.5, recent=0.0), [1.0] * 6) == [1, 1, 1, 0, 0, 0]


def test_padding_is_in_no_tier() -> None:
    """However high its score."""
    assert assigned(h2o(keep=0.5, recent=0.0), [99.0, 99.0, 1.0, 3.0, 2.0, 4.0], length=4) == [-1, -1, 1, 0, 1, 0]


def test_a_ladder_of_any_number_of_tiers() -> None:
    ladder = Policy("ladder", "ladder", (Tier(16), Tier(8), Tier(4), Tier(2)), Amounts((0.1, 0.2, 0.3)), Accumulated())
    tiers = assigned(ladder, [float(i) for i in range(20)])
    assert [tiers.count(i) for i in range(4)] == [2, 4, 6, 8]
    assert tiers == sorted(tiers, reverse=True)  # the higher the score, the better the tier


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mikv(keep=1.2), "no ratio"),
        (lambda: mikv(keep=-0.1), "no ratio"),
        (lambda: mikv(recent=2.0), "no ratio"),
        (lambda: mikv(high=Tier(6)), "16, 8, 5, 4, 3, 2, 1, 0"),
        (lambda: Tier(key_bits=0, value_bits=4), "evicted whole"),
        (lambda: mikv(budget="sliding"), "ratio or fixed"),
        (lambda: h2o(positions="none"), "original or contiguous"),
        (lambda: streaming_llm(sinks=-1), "negative"),
        (lambda: Policy("p", "p", (Tier(16), Tier(2))), "2 tiers, and a budget for 1"),
        (lambda: Policy("p", "p", (Tier(16), Tier(4), Tier(2)), Amounts((0.7, 0.6))), "more than 1"),
        (lambda: Policy("p", "p", (Tier(0), Tier(2)), Amounts((0.5,))), "nothing to demote to"),
        (lambda: Tier(2, group=7).check(64), "does not divide"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("policy", "dim", "percent"),
    [
        # method.md 1.6: the paper's printed sizes at D = 128, and those derived at D = 64
        (mikv(), 128, 32.5),
        (mikv(high=Tier(8)), 128, 23.1),
        (mikv(high=Tier(4)), 128, 18.1),
        (mikv(low=Tier(3)), 128, 37.5),
        (mikv(low=Tier(4)), 128, 42.5),
        (mikv(keep=0.5, low=Tier(3)), 128, 60.9),
        (h2o(), 128, 20.0),
        (mikv(), 64, 35.0),
        (mikv(high=Tier(8)), 64, 26.3),
    ],
)
def test_the_papers_sizes(policy: Policy, dim: int, percent: float) -> None:
    assert policy.paper_size(dim) == pytest.approx(percent, abs=0.06)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep": 0.1},
    {"high": Tier(8)},
    {"low": Tier(2, key_bits=4)},
    {"balance": False},
    {"recent": 0.3},
    {"budget": "fixed"},
    {"low": Tier(2, group=16)},
]


def test_labels_tell_every_difference() -> None:
    assert len({mikv(**options).label for options in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("made", [mikv, h2o])
def test_equal_numbers_are_one_policy(made: Any) -> None:
    """YAML's 0 and 0.0, a command line's 1 and 1.0: no second row of a table, no second key."""
    one, other = made(keep=1, recent=0), made(keep=1.0, recent=0.0)
    assert json.dumps(one.identity()) == json.dumps(other.identity())
    assert one.label == other.label
