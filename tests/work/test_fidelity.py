"""Fidelity on running text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mikv.config import compose
from mikv.engine.requests import Scoring
from mikv.models.load import ModelSpec, load
from mikv.records import read_rows
from mikv.runner import RunError, execute
from mikv.work.fidelity import TEXTS, TextFidelity

MODEL = ModelSpec("tiny-random")


def text(tmp_path: Path, characters: int = 400) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXTS["prose"].read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return str(file)


def test_windows_are_the_text_one_after_the_other(tmp_path: Path) -> None:
    work = TextFidelity(text(tmp_path), context=40, tail=10).open(MODEL, None, 0, "visible")
    loaded = load(MODEL)
    ids = []
    for unit in work.units():
        (request,) = work.encode(unit, loaded).requests
        assert isinstance(request, Scoring)
        assert (request.prompt.tokens, len(request.prompt.question)) == (40, 1)
        (tail,) = request.continuations
        assert len(tail) == 10
        ids += [*request.prompt.context, *request.prompt.question, *tail]
    assert len(work.units()) == 8
    assert loaded.tokenizer.decode(ids) == Path(text(tmp_path)).read_text()
    assert len(TextFidelity(text(tmp_path), context=40, tail=10).open(MODEL, 3, 0, "visible").units()) == 3


def test_more_windows_than_there_are_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(TextFidelity(text(tmp_path), context=40, tail=10).open(MODEL, 99, 0, "visible").units()) == 8
    assert "has 8 windows of 50 tokens, 99 were asked for" in capsys.readouterr().out


def test_its_metric_is_kl_and_fewer_bits_are_farther_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = (
        "[{policy: full}, {policy: uniform, tier.bits: 8}, {policy: uniform, tier.bits: 4}, {policy: uniform, tier.bits: 2}]"
    )
    options = ["task.context=60", "task.tail=12", "task.limit=5", "model=tiny-random", f"out={tmp_path}"]
    run = compose("panel=demo", f"panel.entries={entries}", "task=fidelity", *options)
    full, eight, four, two = execute(run)
    rows = list(read_rows(run.folder() / "samples.jsonl"))
    for row in (full, eight, four, two):
        assert (row["metric"], row["n"], row["lower_is_better"]) == ("kl", 5, True)
        mine = [r for r in rows if r["label"] == row["label"]]
        assert row["value"] == row["kl"] == pytest.approx(sum(r["kl"] for r in mine) / 5)
    assert 0 == full["value"] < eight["value"] < four["value"] < two["value"]
    assert full["agreement"] == 1 > two["agreement"]
    for row in (full, two):  # a divergence is a difference already
        assert not {"difference", "difference_ci95", "mcnemar_p", "lost", "gained"} & set(row)
    assert (full["ci95"], full["kl_ci95"], full["agreement_ci95"]) == (None, None, None)
    assert two["ci95"][0] < two["value"] < two["ci95"][1]
    printed = capsys.readouterr().out
    assert "agree" in printed
    assert not any(f"┃ {column} ┃" in printed for column in ("vs full", "lost", "gained"))
    logprobs = [[r["logprob"] for r in rows if r["label"] == x["label"]] for x in (full, two)]
    assert two["nll_change"] == pytest.approx((sum(logprobs[0]) - sum(logprobs[1])) / (5 * 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, r"task\.context=1"),
        ({"tail": 0}, r"task\.tail=0"),
        ({"text": "nowhere.txt"}, r"task\.text=nowhere\.txt: there is no such file"),
    ],
)
def test_impossible_windows_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TextFidelity(**options)


def test_a_text_that_is_too_short_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 400 tokens, and one window needs 640"):
        TextFidelity(text(tmp_path)).open(MODEL, None, 0, "visible")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        TextFidelity(str(tmp_path / "binary")).open(MODEL, None, 0, "visible")
    with pytest.raises(ValueError, match="asks no question"):
        TextFidelity(text(tmp_path)).open(MODEL, None, 0, "hidden")


def test_a_window_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"16 of 16 samples can't be asked of tiny-random: a window has 640 tokens"):
        execute(compose("task=fidelity", "model=tiny-random", "model.max_tokens=100", f"out={tmp_path}"))
    with pytest.raises(ValueError, match=r"task\.limit=null"):
        compose("task=linerecall", "model=tiny-random", "task.limit=null", f"out={tmp_path}").open()


def test_the_same_text_elsewhere_is_the_same_task(tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(TEXTS["prose"].read_bytes())
    assert TextFidelity(str(copy)).identity() == TextFidelity().identity()
    copy.write_text(copy.read_text() + "more")
    assert TextFidelity(str(copy)).identity() != TextFidelity().identity()


def test_two_texts_of_different_kinds_come_along() -> None:
    """Each with as many windows as a run has, for any tokenizer of words' parts; other names are files."""
    identities = [TextFidelity(name).identity() for name in TEXTS]
    assert len({str(identity) for identity in identities}) == len(TEXTS) == 2
    for file in TEXTS.values():
        assert len(file.read_text(encoding="utf-8")) > 16 * 640 * 3.5
    assert "def " in TEXTS["code"].read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="wanted one, or prose or code"):
        TextFidelity("verse")
