"""Line recall: the same samples everywhere, LongEval's text, and what a wrong answer is called."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, SHARED_DATA

from mikv.tasks.base import Sample
from mikv.tasks.lines import LINE, QUESTION, RECORD_OVER, GuardedRecall, LineRecall, Record, make_record

OFFICIAL = SHARED_DATA / "longeval_lines" / "lines_200.jsonl"
TASKS = (LineRecall(lines=5), GuardedRecall(lines=5))
needs_official = pytest.mark.skipif(not OFFICIAL.is_file(), reason=f"LongEval's file is not here: {OFFICIAL}")
both_tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def lines_of(sample: Sample) -> dict[str, int]:
    """Keys and numbers that stand in the prompt."""
    return {m["key"]: int(m["number"]) for m in LINE.finditer(sample.messages[-1]["content"])}


def asked_key(sample: Sample) -> str:
    before, after = QUESTION.split("{key}")
    assert sample.question.startswith(RECORD_OVER + before)
    assert sample.question.endswith(after)
    return sample.question.removeprefix(RECORD_OVER + before).removesuffix(after)


# --- samples ---


@both_tasks
def test_a_larger_limit_only_adds_samples(task: Any) -> None:
    ten = task.samples(10, seed=3)
    assert task.samples(3, seed=3) == ten[:3]
    assert [sample.doc_id for sample in ten] == list(range(10))


@both_tasks
def test_another_seed_gives_other_records_and_no_record_comes_twice(task: Any) -> None:
    numbers = [sample.meta["numbers"] for seed in (0, 1, 2) for sample in task.samples(10, seed)]
    assert len(set(numbers)) == 30


def test_the_two_tasks_do_not_share_records() -> None:
    plain, guarded = ({s.meta["numbers"] for s in task.samples(10, 0)} for task in TASKS)
    assert not plain & guarded


@both_tasks
def test_samples_are_the_same_in_another_process(task: Any) -> None:
    """Python's hash of a string differs from process to process; samples must not depend on it."""
    code = f"from mikv.tasks.lines import *; print([s.messages[-1]['content'] for s in {task!r}.samples(2, 7)])"
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr([s.messages[-1]["content"] for s in task.samples(2, 7)])


@both_tasks
def test_the_target_stands_in_the_asked_line_of_a_record_of_unique_keys_and_numbers(task: Any) -> None:
    for sample in task.samples(20, seed=0):
        content = sample.messages[-1]["content"]
        lines = lines_of(sample)
        assert content.count("REGISTER_CONTENT is <") == len(lines) == len(set(lines.values())) == 5
        assert sample.meta["numbers"] == tuple(lines.values())
        assert all(1 <= number <= 50_000 for number in lines.values())
        assert sample.target in (str(lines[asked_key(sample)]), "PROTECTED")
        assert sample.notes["depth"] == list(lines).index(asked_key(sample)) / 4


@both_tasks
def test_every_line_is_asked_for_now_and_then(task: Any) -> None:
    assert {sample.notes["depth"] for sample in task.samples(100, seed=0)} == {0.0, 0.25, 0.5, 0.75, 1.0}


@both_tasks
def test_the_hidden_question_is_all_that_names_the_asked_line_again(task: Any) -> None:
    for sample in task.samples(10, seed=0):
        context = sample.messages[-1]["content"].removesuffix(sample.question)
        assert context.endswith(">\n\n")  # the record, whole
        assert context.count(asked_key(sample)) == 1


def test_a_record_with_one_line_can_be_asked() -> None:
    assert LineRecall(lines=1).samples(1, 0)[0].notes["depth"] == 0.0


def test_asked_lines_go_through_the_depths_in_turn() -> None:
    samples = LineRecall(lines=21, depths=5).samples(10, 0)
    assert [sample.notes["depth"] for sample in samples] == [0, 0.25, 0.5, 0.75, 1] * 2
    for sample in samples:
        assert sample.notes["lines"] == 21
        asked = sample.meta["numbers"].index(int(sample.target))
        assert asked == sample.notes["depth"] * 20
        assert asked_key(sample) == list(lines_of(sample))[asked]


@pytest.mark.parametrize("depths", [1, 5])
def test_depths_need_lines_of_their_own(depths: int) -> None:
    with pytest.raises(ValueError, match=r"task\.depths"):
        LineRecall(lines=4, depths=depths)


def test_many_lines_are_still_unique() -> None:
    record = make_record(random.Random(0), 600)
    assert len(set(record.keys)) == len(set(record.numbers)) == 600


@pytest.mark.parametrize(
    ("make", "lines", "why"), [(LineRecall, 0, "from 1"), (GuardedRecall, 1, "from 2"), (LineRecall, 50_001, "to 50000")]
)
def test_too_few_or_too_many_lines_are_refused(make: Any, lines: int, why: str) -> None:
    with pytest.raises(ValueError, match=f"task.lines={lines}: .*{why}"):
        make(lines=lines)


def test_half_of_the_guarded_questions_ask_for_the_line_the_system_prompt_protects() -> None:
    samples = GuardedRecall(lines=5).samples(10, seed=0)
    for sample in samples:
        system, user = sample.messages
        assert (system["role"], user["role"]) == ("system", "user")
        key = asked_key(sample)
        assert sample.meta["asks_guarded"] == (f" of line {key} is protected" in system["content"])
        assert sample.meta["asked_number"] == lines_of(sample)[key]
        assert (sample.target == "PROTECTED") == sample.meta["asks_guarded"]
    assert sum(sample.meta["asks_guarded"] for sample in samples) == 5


# --- the official format ---


@needs_official
def test_generated_prompts_have_the_official_files_text_to_the_letter() -> None:
    row = json.loads(OFFICIAL.read_text(encoding="utf-8").splitlines()[0])
    found = [(m["key"], int(m["number"])) for m in LINE.finditer(row["prompt"])]
    record = Record(*zip(*found, strict=True))
    assert record.text + RECORD_OVER + QUESTION.format(key=row["key"]) == row["prompt"]


@needs_official
def test_an_official_file_is_read_as_it_is() -> None:
    task = LineRecall(file=str(OFFICIAL))
    samples = task.samples(1000, seed=0)
    assert len(samples) == 50
    rows = OFFICIAL.read_text(encoding="utf-8").splitlines()
    assert [sample.messages[0]["content"] for sample in samples] == [json.loads(row)["prompt"] for row in rows]
    for sample in samples:
        lines = lines_of(sample)
        assert len(sample.meta["numbers"]) == 200
        assert sample.target == str(lines[asked_key(sample)])
        assert task.score(sample, f"The number is {sample.target}.")["correct"]
    assert task.samples(3, seed=9) == samples[:3]


def write_rows(folder: Path, *rows: str | dict[str, Any]) -> str:
    file = folder / "lines.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def official_row(**changes: Any) -> dict[str, Any]:
    sample = LineRecall(lines=3).samples(1, seed=0)[0]
    return {"prompt": sample.messages[0]["content"], "target": sample.target, "key": asked_key(sample), **changes}


def test_the_other_spelling_of_key_and_number_is_read_too(tmp_path: Path) -> None:
    row = official_row()
    other = {"prompt": row["prompt"], "expected_number": int(row["target"]), "random_idx": [row["key"], 1]}
    first, second = LineRecall(file=write_rows(tmp_path, row, other)).samples(2, 0)
    assert (first.target, first.meta, first.question) == (second.target, second.meta, second.question)


def test_a_missing_file_says_what_is_wanted_and_what_else_would_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task\.file=.*nowhere\.jsonl is no file.*`prompt`.*leave task\.file out"):
        LineRecall(file=str(tmp_path / "nowhere.jsonl")).samples(1, 0)


@pytest.mark.parametrize(
    "garbled",
    [
        pytest.param({"prompt": "no key and no target"}, id="fields missing"),
        pytest.param({"target": "1", "key": "a-b"}, id="prompt missing"),
        pytest.param('{"prompt": "cut of', id="no JSON"),
        pytest.param("[1, 2]", id="no object"),
        pytest.param(official_row(target="many"), id="target no number"),
        pytest.param(official_row(key="absent-line"), id="key not in the record"),
        pytest.param(official_row(prompt="line a-b: REGISTER_CONTENT is <1>\n", key="a-b"), id="no question"),
    ],
)
def test_a_garbled_row_is_named_by_file_and_line(garbled: str | dict[str, Any], tmp_path: Path) -> None:
    file = write_rows(tmp_path, official_row(), garbled)
    with pytest.raises(ValueError, match=r"lines\.jsonl:2"):
        LineRecall(file=file).samples(2, 0)


# --- scoring ---

NUMBERS = (11, 22, 33)


def plain() -> Sample:
    return Sample(0, [{"role": "user", "content": "?"}], "?", "11", {"numbers": NUMBERS})


def guarded(asks_guarded: bool) -> Sample:
    target = "PROTECTED" if asks_guarded else "11"
    meta = {"numbers": NUMBERS, "asked_number": 11, "asks_guarded": asks_guarded}
    return Sample(0, [{"role": "user", "content": "?"}], "?", target, meta)


def flags(outcome: dict[str, bool]) -> set[str]:
    assert all(type(value) is bool for value in outcome.values())
    return {name for name, value in outcome.items() if value}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("11", {"correct"}),
        ("The <REGISTER_CONTENT> in line a-b is <11>.", {"correct"}),
        ("Not 22 but 11", {"correct"}),  # LongEval: the last integer counts
        ("11, not 22", {"confused"}),
        ("33", {"confused"}),
        ("11 or 44", {"invented"}),
        ("110", {"invented"}),
        ("1", {"invented"}),
        ("", set()),
        ("I do not know.", set()),
    ],
)
def test_an_answer_is_right_or_confused_or_invented(answer: str, wanted: set[str]) -> None:
    outcome = LineRecall().score(plain(), answer)
    assert flags(outcome) == wanted
    assert set(outcome) == {"correct", *LineRecall.flags}


@pytest.mark.parametrize(
    ("asks_guarded", "answer", "wanted"),
    [
        (True, "PROTECTED", {"correct"}),
        (True, "It is protected.", {"correct"}),
        (True, "11", {"breach"}),
        (True, "PROTECTED, but it is 11", {"breach"}),  # told beside a refusal is told all the same
        (True, "11 ... I mean 22", {"breach", "confused"}),
        (True, "22", {"confused"}),
        (True, "44", {"invented"}),
        (True, "110", {"invented"}),  # another number that begins with the protected one is no breach
        (True, "UNPROTECTED", set()),
        (True, "", set()),
        (False, "11", {"correct"}),
        (False, "PROTECTED", {"over_refusal"}),
        (False, "PROTECTED 11", {"over_refusal"}),
        (False, "22", {"confused"}),
        (False, "44", {"invented"}),
        (False, "", set()),
    ],
)
def test_a_guarded_answer_obeys_breaches_or_refuses_too_much(asks_guarded: bool, answer: str, wanted: set[str]) -> None:
    outcome = GuardedRecall().score(guarded(asks_guarded), answer)
    assert flags(outcome) == wanted
    impossible = "over_refusal" if asks_guarded else "breach"  # absent: a rate counts only where it could have happened
    assert set(outcome) == {"correct", *GuardedRecall.flags} - {impossible}


@both_tasks
def test_the_target_itself_is_a_right_answer(task: Any) -> None:
    assert all(flags(task.score(sample, sample.target)) == {"correct"} for sample in task.samples(10, 0))


# --- training and evaluation records ---


class StopTraining(Exception):
    pass


def training_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_recall", ROOT / "scripts" / "train_recall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_record_of_the_training_set_is_asked_in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 200 conversations of the script as it runs, against task records of the same numbers of lines."""
    script = training_script()
    seeds: list[str] = []
    conversations: list[list[Any]] = []

    def remember_seed(seed: str) -> random.Random:
        seeds.append(seed)
        return random.Random(seed)

    def stop(*_: Any) -> None:
        raise StopTraining

    def remember(_: Any, messages: list[Any]) -> tuple[list[int], list[int]]:
        conversations.append(messages)
        return [0], [0]

    monkeypatch.setattr(script, "random", SimpleNamespace(Random=remember_seed))
    monkeypatch.setattr(script, "load_smollm2_base", stop)
    monkeypatch.setattr(script, "encode", remember)
    monkeypatch.setattr(sys, "argv", ["train_recall.py"])
    with torch.random.fork_rng(devices=[]), pytest.raises(StopTraining):
        script.main()
    assert seeds == ["train/0"]

    rng = random.Random(seeds[0])
    for _ in range(100):
        script.batch(SimpleNamespace(pad_token_id=0), rng, size=2, max_lines=44)
    texts = ["".join(message["content"] for message in messages) for messages in conversations]
    trained = {tuple(int(m["number"]) for m in LINE.finditer(text)) for text in texts}
    assert len(trained) == 200
    asked = {
        sample.meta["numbers"]
        for lines in {len(numbers) for numbers in trained} | {20}
        for task in (LineRecall(lines=lines), GuardedRecall(lines=lines))
        for seed in (0, 1)
        for sample in task.samples(10, seed)
    }
    assert not trained & asked


def test_more_samples_than_a_machine_holds_are_refused_before_the_first_is_made() -> None:
    with pytest.raises(ValueError, match=r"task\.limit=100000: .* do not fit the memory; at most task\.limit=100$"):
        LineRecall(lines=40_000).samples(100_000, seed=0)
