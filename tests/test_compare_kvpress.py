"""The comparison with kvpress, as far as it needs no kvpress: what is asked, what is counted, what is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import engine, named_policy, tokens

from mikv.budget import Amounts
from mikv.config import policy
from mikv.importance.scores import Accumulated
from mikv.policy import Policy
from mikv.quant.tier import Tier
from scripts import compare_kvpress as compare
from scripts.compare_kvpress import PAIRS, Pair

NESTED = Pair(
    "adakv", {}, {"class": "AdaKVPress", "alpha_safeguard": 0.2, "press": {"class": "SnapKVPress", "window_size": 32}}
)
KNORM = Pair("knorm", {}, {"class": "KnormPress"}, attention="eager")


def choice(*layers: list[list[int]], width: int = 6) -> torch.Tensor:
    """One prompt's, by layer and head: bool [L, 1, H, T]."""
    return compare.mask([layers], width)


def test_the_overlap_is_counted_layer_by_layer() -> None:
    ours = choice([[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [0, 1, 2]])
    theirs = choice([[0, 1, 2], [3, 4, 5]], [[0, 1, 5], [3, 4, 5]])
    found = compare.agreement(ours, theirs)
    assert found.layers == pytest.approx((1.0, 2 / 6))
    assert found.mean == pytest.approx(4 / 6)
    assert (found.worst, found.differing, found.kept) == (1, 4, (12, 12))
    assert compare.agreement(ours, ours).layers == (1.0, 1.0)


def test_heads_may_keep_different_numbers_and_keeping_more_is_no_way_to_agree() -> None:
    theirs = choice([[0], [1, 2, 3]])
    assert compare.agreement(choice([[0], [1, 2, 3]]), theirs).mean == 1
    assert compare.agreement(choice([[0, 4], [1, 2]]), theirs).mean == pytest.approx(3 / 4)
    everything = compare.agreement(torch.ones_like(theirs), theirs)
    assert (everything.mean, everything.differing) == (pytest.approx(4 / 12), 8)
    assert compare.agreement(theirs, torch.ones_like(theirs)).mean == pytest.approx(4 / 12)


def test_prompts_are_kept_apart() -> None:
    both = compare.mask([[[[0]], [[1]]], [[[2]], [[3]]]], 4)  # two prompts of two layers of one head
    assert [[row.nonzero().flatten().tolist() for row in layer[:, 0]] for layer in both] == [[[0], [2]], [[1], [3]]]
    other = compare.mask([[[[0]], [[1]]], [[[2]], [[0]]]], 4)
    assert compare.agreement(both, other).layers == (1.0, 0.5)


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.29, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("length", [100, 200, 400, 999])
def test_kvpress_is_asked_for_as_many_tokens_as_ours_keeps(keep: float, length: int) -> None:
    kept, ratio = compare.budget(length, keep)
    assert kept == Amounts((keep,)).counts(torch.tensor([length]))[0]
    assert int(length * (1 - ratio)) == kept  # how kvpress counts them
    assert ratio == pytest.approx((length - kept) / length, abs=1e-12)


@pytest.mark.parametrize("keep", [0.0, 1.0, 1.5, 0.001])
def test_a_budget_that_leaves_no_choice_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        compare.budget(400, keep)


def test_a_policy_that_this_checkout_has_not_got_is_left_out_and_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare.chosen([NESTED, KNORM], {"knorm", "h2o"}, None) == ([KNORM], [NESTED])
    assert compare.chosen([NESTED, KNORM], {"knorm", "adakv"}, ["adakv"]) == ([NESTED], [])
    monkeypatch.setattr(compare, "known_policies", set)
    with pytest.raises(SystemExit):
        compare.main(["--only", "h2o"])
    said = capsys.readouterr()
    assert "left out: h2o, beside ObservedAttentionPress" in said.out
    assert "no pair is left" in said.err


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.policy)
def test_every_pair_of_a_known_policy_can_be_built(pair: Pair) -> None:
    if pair.policy not in compare.known_policies():
        pytest.skip("no such policy in this checkout")
    built = policy(pair.policy, {**pair.options, "keep": 0.5})
    assert built.evicts


def test_the_request_says_all_and_the_ratio_to_the_innermost_press() -> None:
    asked = compare.request(Path("model"), [[1, 2], [3, 4]], [NESTED, KNORM], 0.5)
    assert json.loads(json.dumps(asked)) == asked
    assert asked["prompts"] == [[1, 2], [3, 4]]
    adakv, knorm = asked["presses"]["adakv"], asked["presses"]["knorm"]
    assert adakv["press"]["press"] == {"class": "SnapKVPress", "window_size": 32, "compression_ratio": 0.5}
    assert "compression_ratio" not in adakv["press"]
    assert knorm == {"press": {"class": "KnormPress", "compression_ratio": 0.5}, "attention": "eager"}
    assert "compression_ratio" not in KNORM.press
    assert NESTED.press_name == "AdaKVPress(SnapKVPress)"


def test_what_a_cache_holds_is_read_from_all_of_its_tiers() -> None:
    prompts = [tokens(24, seed) for seed in (0, 1)]
    three = Policy(
        name="three",
        label="three",
        tiers=(Tier(16), Tier(8), Tier(0)),
        budget=Amounts((0.25, 0.25), of="prompt"),
        importance=Accumulated(),
        sinks=1,
    )
    ends, two = policy("streaming_llm", {"keep": 0.5}), named_policy("pyramid")
    served = engine()
    state = served.prefill(prompts, three.observers | two.observers)
    found = compare.held(served.compress(state, [ends]), 24)
    assert (found == torch.tensor([*[True] * 4, *[False] * 12, *[True] * 8])).all()
    layers, batch, heads = found.shape[:3]
    assert compare.held(served.compress(state, [three]), 24).sum(dim=-1).eq(12).all()
    uneven = served.compress(state, [two])  # heads that hold different numbers: slots behind the last one count nothing
    of_tier = uneven.banks[0].stores[0].tiers[0]
    held = compare.held(uneven, 24)
    assert torch.equal(held.sum(dim=-1), of_tier.count)
    assert held.shape == (layers, batch, heads, 24)
    assert of_tier.count.unique().numel() > 1


def test_a_reason_is_given_where_tokens_differ_and_only_there() -> None:
    same, other, more = choice([[0, 1]]), choice([[0, 2]]), choice([[0, 1, 2]])
    why = Pair("a", {}, {"class": "B"}, why="because")
    assert compare.reason(why, compare.agreement(same, same)) == ""
    assert compare.reason(why, compare.agreement(same, other)) == "1 of 2 tokens: because"
    assert compare.reason(KNORM, compare.agreement(same, other)) == "1 of 2 tokens; no reason is known"
    assert "ours keeps 2, theirs 3" in compare.reason(KNORM, compare.agreement(same, more))


def test_another_model_is_noticed() -> None:
    keys = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    compare.check_same_model(keys, (keys * (1 + 1e-6)).tolist())
    with pytest.raises(SystemExit, match="same model"):
        compare.check_same_model(keys, (keys + 0.01).tolist())
    with pytest.raises(SystemExit, match="same model"):
        compare.check_same_model(keys, (keys * torch.nan).tolist())


def test_what_cannot_be_installed_is_told_in_pips_words() -> None:
    fails = [sys.executable, "-c", "print('no such build'); raise SystemExit(1)"]
    compare.install("torch", fails, [sys.executable, "-c", ""])
    with pytest.raises(SystemExit, match=r"torch could not be installed[\s\S]*no such build"):
        compare.install("torch", fails, fails)


def test_an_environment_is_made_once_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def install(what: str, *_: Any) -> None:
        if broken and what == compare.KVPRESS:
            raise SystemExit("no network")
        made.append(what)

    monkeypatch.setattr(compare, "install", install)
    broken = True
    with pytest.raises(SystemExit):
        compare.environment(tmp_path)
    broken = False
    python = compare.environment(tmp_path)
    assert made[-1] == compare.KVPRESS
    made.clear()
    assert compare.environment(tmp_path) == python
    assert made == []


def test_the_tokens_that_a_press_keeps_are_found_by_their_keys(kvpress_side: Any) -> None:
    keys = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    stays = torch.stack((keys[0, [4, 1]], keys[1, [0, 3]]))
    assert kvpress_side.positions(keys, stays, None) == [[1, 4], [0, 3]]
    masked = (torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 4]))
    assert kvpress_side.positions(keys, keys, masked) == [[0, 1, 3, 4], [1, 2, 3]]
    with pytest.raises(ValueError, match="not among those"):
        kvpress_side.positions(keys, stays + 1, None)


def test_a_press_is_built_with_the_press_in_it(kvpress_side: Any) -> None:
    press = kvpress_side.built({"class": "Press", "a": 1, "press": {"class": "Press", "b": 2}})
    assert (press.a, press.press.b) == (1, 2)
    assert kvpress_side.built(None) is None
