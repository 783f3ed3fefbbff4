"""MemoTrap: two endings, scored as continuations."""

from __future__ import annotations

from pathlib import Path

import own_rows
import pytest
import torch

from mikv.config import compose
from mikv.engine.requests import Scoring
from mikv.models.load import ModelSpec, load
from mikv.records import read_rows
from mikv.runner import execute
from mikv.work.memo_trap import MemoTrap

MODEL = ModelSpec("tiny-random")
PUBLISHED = own_rows.ROWS["memo_trap/1-proverb-ending.jsonl"]


def test_each_ending_goes_on_from_the_prompt(tmp_path: Path) -> None:
    work = MemoTrap(data_dir=own_rows.write(tmp_path)).open(MODEL, None, 0, "visible")
    loaded = load(MODEL)
    assert sorted(unit.doc_id for unit in work.units()) == [0, 1, 2, 3]
    for unit in work.units():
        (request,) = work.encode(unit, loaded).requests
        assert isinstance(request, Scoring)
        prompt = [*request.prompt.context, *request.prompt.question]
        texts = [loaded.tokenizer.decode([*prompt, *ending]) for ending in request.continuations]
        row = PUBLISHED[unit.doc_id]
        assert texts == [row["prompt"] + choice for choice in row["choices"]]
        assert loaded.tokenizer.decode(prompt) == row["prompt"]


def test_the_likelier_ending_is_the_answer_by_the_models_own_numbers(tmp_path: Path) -> None:
    options = ["model=tiny-random", "policy=uniform", "policy.tier.bits=2", f"out={tmp_path / 'runs'}"]
    run = compose("task=memo_trap", f"task.data_dir={own_rows.write(tmp_path)}", *options)
    full, compressed = execute(run)
    loaded = load(MODEL, attention="sdpa")
    rows = list(read_rows(run.folder() / "samples.jsonl"))
    assert len(rows) == 8
    for row in rows:
        published = PUBLISHED[row["doc_id"]]
        best = published["choices"][max((0, 1), key=lambda i: row["logprobs"][i])]
        assert row["answer"] == best
        assert row["target"] == " pie."
        assert row["correct"] == (best == " pie.") != row["memorized"]
        if row["label"] == "full":
            for choice, logprob in zip(published["choices"], row["logprobs"], strict=True):
                start = loaded.tokenizer(published["prompt"], return_tensors="pt")["input_ids"]
                ids = loaded.tokenizer(published["prompt"] + choice, return_tensors="pt")["input_ids"]
                logits = loaded.model(ids).logits.log_softmax(-1)[0, :-1]
                each = logits[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
                assert logprob == pytest.approx(each[start.shape[1] - 1 :].sum().item(), abs=0.02)
    for summary in (full, compressed):
        mine = [row for row in rows if row["label"] == summary["label"]]
        assert summary["value"] == sum(row["correct"] for row in mine) / 4


def test_the_other_part_and_what_can_not_be(tmp_path: Path) -> None:
    data = own_rows.write(tmp_path)
    other = MemoTrap("translation", data_dir=data)
    assert len(other.open(MODEL, None, 0, "visible").units()) == 1
    assert other.identity() != MemoTrap(data_dir=data).identity() == MemoTrap().identity()
    with pytest.raises(ValueError, match=r"task\.part=verse: choose ending or translation"):
        MemoTrap("verse")
    with pytest.raises(ValueError, match="no question apart"):
        other.open(MODEL, None, 0, "hidden")
    work = other.open(MODEL, None, 0, "visible")
    with pytest.raises(ValueError, match=r"has \d+ tokens and the model's limit is 20"):
        work.encode(work.units()[0], load(ModelSpec("tiny-random", max_tokens=20)))


def test_another_row_is_another_unit(tmp_path: Path) -> None:
    name = "memo_trap/1-proverb-ending.jsonl"
    changed = own_rows.write(tmp_path / "b", {name: [{**PUBLISHED[0], "answer": 0}, *PUBLISHED[1:]]})
    one, two = (
        {unit.doc_id: unit.asked for unit in MemoTrap(data_dir=data).open(MODEL, None, 0, "visible").units()}
        for data in (own_rows.write(tmp_path / "a"), changed)
    )
    assert one[0] != two[0]
    assert one[1] == two[1]
