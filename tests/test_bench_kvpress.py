"""What a curve costs here and with kvpress, as far as it needs neither: what is asked, what is added up, what is refused."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import engine, tokens

from mikv.config import policy
from scripts import bench_kvpress as bench
from scripts import compare_kvpress as compare
from scripts.compare_kvpress import Pair

SNAPKV = Pair("snapkv", {"window": 8, "kernel": 5}, {"class": "SnapKVPress", "window_size": 8})
ADAKV = Pair("adakv", {}, {"class": "AdaKVPress", "press": {"class": "SnapKVPress"}}, attention="eager")


def test_a_curve_is_every_method_at_every_budget() -> None:
    points = bench.curve([SNAPKV, ADAKV], (0.2, 0.5), 100, full=False)
    assert [point.name for point in points] == ["snapkv 0.2", "snapkv 0.5", "adakv 0.2", "adakv 0.5"]
    assert [int(100 * (1 - point.ratio)) for point in points] == [20, 50, 20, 50]  # how kvpress counts them
    assert [point.name for point in bench.curve([SNAPKV], (0.5,), 100, full=True)] == ["full", "snapkv 0.5"]
    assert points[1].policy() == policy("snapkv", {"window": 8, "kernel": 5, "keep": 0.5})
    with pytest.raises(ValueError, match="nothing is to be chosen"):
        bench.curve([SNAPKV], (0.5, 0.001), 100, full=False)


def test_each_point_is_a_press_of_its_own_in_the_request() -> None:
    points = bench.curve([ADAKV], (0.25, 0.5), 100, full=True)
    timed = {"rounds": 2, "steps": 3, "threads": 1, "turns": True}
    asked = bench.request(Path("model"), [(1, 2)], points, timed)
    assert json.loads(json.dumps(asked)) == asked
    assert asked["prompts"] == [[1, 2]]
    assert asked["timed"] == timed
    assert asked["presses"]["full"] == {"press": None, "attention": "sdpa"}
    for name, ratio in (("adakv 0.25", 0.75), ("adakv 0.5", 0.5)):
        press = asked["presses"][name]
        assert press["attention"] == "eager"
        assert press["press"] == {"class": "AdaKVPress", "press": {"class": "SnapKVPress", "compression_ratio": ratio}}


def test_kvpress_runs_its_presses_one_after_the_other() -> None:
    """Two rounds of two prompts and two steps: presses are added up, prompts are averaged, rounds are kept apart."""
    times = {
        "a": {"prefill": [1, 3, 10, 30], "step": [1, 1, 2, 2, 10, 10, 20, 20]},
        "b": {"prefill": [2, 2, 0, 0], "step": [0, 0, 0, 2, 0, 0, 0, 0]},
    }
    assert bench.rounds_of(times, 2, 2, 2) == [{"prefill": 4, "decode": 4}, {"prefill": 20, "decode": 30}]
    with pytest.raises(ValueError, match="a: 4 times of prefill, wanted 6"):
        bench.rounds_of(times, 3, 2, 2)


def test_ratios_are_of_the_same_round_and_medians_of_all() -> None:
    theirs = [{"prefill": 10.0, "decode": 5.0}, {"prefill": 100.0, "decode": 50.0}, {"prefill": 12.0, "decode": 8.0}]
    ours = [
        {"prefill": 1.0, "compress": 1.0, "decode": 1.0},
        {"prefill": 15.0, "compress": 10.0, "decode": 10.0},
        {"prefill": 1.0, "compress": 0.5, "decode": 2.0},
    ]
    found = bench.compared(theirs, ours)
    assert found["prefill and compression"] == {"kvpress": 12, "ours": 2, "ratio": 5}
    assert found["decode"] == {"kvpress": 8, "ours": 2, "ratio": 5}
    assert found["total"] == {"kvpress": 20, "ours": 3.5, "ratio": 5}
    assert found["compression"] == {"ours": 1}
    with pytest.raises(ValueError, match="shorter"):
        bench.compared(theirs, ours[:2])


def test_the_cost_of_a_press_is_a_median_of_prompts_and_of_steps() -> None:
    presses = {"a": {"prefill": [1, 2, 9], "step": [1, 1, 1, 1, 7, 7]}}
    assert bench.press_costs({"wall": presses}, "a", 16) == {"wall": {"prefill": 2, "decode": 16}}


def test_whether_the_aim_is_reached_is_said() -> None:
    assert "not reached" in bench.verdict(9.96)
    assert "not reached" not in bench.verdict(10.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "0"], "--prompts 0: at least 1"),
        (["--threads", "0"], "--threads 0: at least 1"),
        (["--steps", "-1"], "--steps -1: at least 1"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--batch", "3", "--prompts", "2"], "--batch 3: more than the 2 prompts"),
        (["--keep", "1"], "--keep"),
        (["--keeps", "0.2,1.5"], "--keep"),
        (["--keeps", "0.2,,0.5"], "wanted numbers with commas"),
        (["--keeps", "0.2,0.20"], "comes twice"),
        (["--keeps", "0.2", "--keep", "0.5"], "not allowed with"),
        (["--only", "nothing"], "invalid choice"),
        (["--model", "nothing"], "there is no model 'nothing'"),
    ],
)
def test_bad_options_are_refused(
    arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: Path) -> Path:
        raise AssertionError("no environment is to be made for a slip")

    monkeypatch.setattr(bench, "environment", none)
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert said in " ".join(capsys.readouterr().err.split())


def test_several_budgets_are_read() -> None:
    assert bench.shares("0.2,0.5") == (0.2, 0.5)
    with pytest.raises(argparse.ArgumentTypeError):
        bench.shares("")


@pytest.mark.parametrize("batch", [1, 2])
def test_our_side_decodes_as_many_tokens_as_kvpress_and_counts_all_prompts(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine()
    fed: list[int] = []
    widths: list[list[int]] = []
    step, prefill = served.step, served.prefill

    def counted_step(cache: Any, given: Any, *rest: Any) -> Any:
        fed.append(len(given))
        return step(cache, given, *rest)

    def counted_prefill(contexts: Any, observers: Any) -> Any:
        widths.append([len(context) for context in contexts])
        return prefill(contexts, observers)

    monkeypatch.setattr(served, "step", counted_step)
    monkeypatch.setattr(served, "prefill", counted_prefill)
    from mikv.cache.compressed import Workspace

    ours = bench.Ours(served, None, Workspace())
    text = [tokens(25, seed) for seed in (0, 1)]
    panel = [policy("knorm", {"keep": keep}) for keep in (0.25, 0.5, 0.75)]
    spent = ours.per_prompt(text, panel, batch, 4)
    runs = 2 // batch
    assert widths == [[24] * batch] * runs  # the last token is fed through the compressed cache
    assert fed == [len(panel) * batch] * 4 * runs  # all policies in one batch
    assert set(spent) == set(bench.CLOCKS)
    assert all(spent["wall"][phase] > 0 for phase in ("prefill", "compress", "decode"))
    exact = prefill([of[:-1] for of in text], set()).banks[-1].keys[-1, :, :, -1]
    compare.check_same_model(ours.last_keys, exact.tolist())


def timed_request(rounds: int) -> dict[str, Any]:
    presses = {name: {"press": None, "attention": "sdpa"} for name in ("a", "b")}
    timed = {"rounds": rounds, "steps": 2, "threads": 1, "turns": True}
    return {"prompts": [[1], [2]], "presses": presses, "timed": timed}


def test_the_other_side_waits_for_its_turn_and_its_first_round_does_not_count(
    kvpress_side: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []

    def timed(_model: Any, _press: Any, prompt: list[int], steps: int) -> Any:
        asked.append(prompt)
        return (float(len(asked)), 0.5), [(0.1, 0.2)] * steps

    monkeypatch.setattr(kvpress_side, "timed", timed)
    model = SimpleNamespace(set_attn_implementation=lambda _: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    found = kvpress_side.all_timed(model, timed_request(1))
    assert capsys.readouterr().out.split() == ["turn", "done", "done"] * 2
    assert asked == [[1], [1], [1], [2], [1], [2]]  # one prompt warms up
    assert found["processor"]["a"] == {"prefill": [3, 4], "step": [0.1] * 4}
    assert found["wall"]["b"] == {"prefill": [0.5, 0.5], "step": [0.2] * 4}
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(SystemExit, match="nobody"):
        kvpress_side.all_timed(model, timed_request(1))


def test_both_sides_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "side.py"
    stand_in.write_text(
        "import pathlib, sys\n"
        "for _ in range(2):\n"
        "    print('turn', flush=True)\n"
        "    seen = pathlib.Path(sys.argv[0]).with_name('turns').read_text() if sys.stdin.readline() else ''\n"
        "    print('done', flush=True)\n"
        'pathlib.Path(sys.argv[2]).write_text(f\'{{"seen": "{seen}"}}\')\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(compare, "SIDE", stand_in)
    turns: list[str] = []

    def turn() -> None:
        turns.append("x")
        (tmp_path / "turns").write_text("".join(turns), encoding="utf-8")

    assert compare.ask(Path(sys.executable), {}, 2, "stand-in", turn) == {"seen": "xx"}
