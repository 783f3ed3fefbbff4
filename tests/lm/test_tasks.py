"""lm-eval's tasks: found by name, with local data or a message that says how to get them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import SHARED_DATA
from lm_eval.api.group import Group
from own_tasks import write

from mikv.lm.humaneval import HUMANEVAL
from mikv.lm.tasks import Catalogue, build_requests
from mikv.tasks.data import DataUnavailable


@pytest.fixture
def catalogue(own: tuple[Path, Path]) -> Catalogue:
    return Catalogue(include=str(own[0]))


def test_a_group_keeps_its_shape_and_its_parts_can_be_chosen(catalogue: Catalogue, own: tuple[Path, Path]) -> None:
    (group,) = catalogue.load(["own_group"], None, str(own[1]))
    assert isinstance(group, Group)
    assert sorted(task.task_name for task in group.get_all_tasks()) == ["own_choice", "own_letters"]
    assert [metric.metric for metric in group.aggregate_metric_list or []] == ["acc"]
    (part,) = catalogue.load(["own_group"], ["own_letters"], str(own[1]))
    assert isinstance(part, Group)
    assert [task.task_name for task in part.get_all_tasks()] == ["own_letters"]


def test_local_files_are_found_by_configuration_and_split(catalogue: Catalogue, own: tuple[Path, Path]) -> None:
    choice, answer = catalogue.load(["own_choice", "own_answer"], None, str(own[1]))
    assert len(choice.eval_docs) == 9
    assert len(list(choice.fewshot_docs())) == 3
    assert len(answer.eval_docs) == 7


def test_a_split_that_nobody_needs_may_be_missing(catalogue: Catalogue, tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [{"question": "one?", "answer": "1"}])
    (task,) = catalogue.load(["own_cloze"], None, str(tmp_path))
    assert len(task.eval_docs) == 1
    with pytest.raises(DataUnavailable, match=r"own_answer needs the split 'train' .*train\.jsonl"):
        catalogue.load(["own_answer"], None, str(tmp_path))


@pytest.mark.parametrize(
    ("names", "only", "message"),
    [
        (["own_choise"], None, r"no task 'own_choise'; did you mean own_choice"),
        (["own_group"], ["own_lettres"], r"task\.only names own_lettres; there are own_choice, own_letters"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(
    catalogue: Catalogue, own: tuple[Path, Path], names: list[str], only: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        catalogue.load(names, only, str(own[1]))


def test_missing_data_say_how_to_get_them(catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataUnavailable, match="is not a folder"):
        catalogue.load(["own_choice"], None, str(tmp_path / "nowhere"))
    with pytest.raises(DataUnavailable, match=r"split 'dev' .*words/dev\.jsonl, words\.jsonl, dev\.jsonl"):
        catalogue.load(["own_choice"], None, str(tmp_path))

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'somewhere/own_choice' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataUnavailable) as error:
        catalogue.load(["own_choice"], None, None)
    for part in ("somewhere/own_choice (words)", "Couldn't reach", "hf download --repo-type dataset", "task.data_dir="):
        assert part in str(error.value)


@pytest.fixture(scope="module")
def lm_evals_own() -> Catalogue:
    return Catalogue(own={"humaneval": HUMANEVAL})


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmarks' files are not here")
@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "folder", "documents"),
    [
        ("gsm8k_cot", "gsm8k", 1319),
        ("gsm8k", "gsm8k", 1319),
        ("truthfulqa_mc1", "truthfulqa", 817),
        ("truthfulqa_mc2", "truthfulqa", 817),
        ("wikitext", "wikitext2", 62),
        ("humaneval", "humaneval", 164),
        ("mmlu_anatomy", "mmlu", 135),
    ],
)
def test_the_published_files_are_what_the_tasks_expect(lm_evals_own: Catalogue, name: str, folder: str, documents: int) -> None:
    (task,) = lm_evals_own.load([name], None, str(SHARED_DATA / folder))
    assert len(task.eval_docs) == documents
    assert task.doc_to_target(task.eval_docs[0]) is not None


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmarks' files are not here")
@pytest.mark.usefixtures("own")
def test_mmlu_is_57_subjects_in_four_groups(lm_evals_own: Catalogue) -> None:
    (mmlu,) = lm_evals_own.load(["mmlu"], None, str(SHARED_DATA / "mmlu"))
    assert isinstance(mmlu, Group)
    tasks = mmlu.get_all_tasks()
    assert len(tasks) == 57
    assert sum(len(task.eval_docs) for task in tasks) == 14042
    assert sorted(group.name for group in mmlu.get_all_groups()) == [
        "mmlu_humanities", "mmlu_other", "mmlu_social_sciences", "mmlu_stem",
    ]  # fmt: skip
    (some,) = lm_evals_own.load(["mmlu"], ["anatomy", "mmlu_virology"], str(SHARED_DATA / "mmlu"))
    assert isinstance(some, Group)
    assert sorted(task.task_name for task in some.get_all_tasks()) == ["mmlu_anatomy", "mmlu_virology"]


# --- local files that are not what they should be ---

GOOD = [{"question": f"what is {i}?", "answer": str(i)} for i in range(4)]


def answer_task(catalogue: Catalogue, folder: Path, test: bytes, train: bytes | None = None) -> Any:
    """own_answer, asked with these files; its requests are made."""
    (folder / "test.jsonl").write_bytes(test)
    (folder / "train.jsonl").write_bytes(lines(*GOOD) if train is None else train)
    (task,) = catalogue.load(["own_answer"], None, str(folder))
    task.set_fewshot_seed(seed=0)
    build_requests(task, None)
    return task


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", r"test\.jsonl is empty; wanted: one JSON object a line"),
    "no JSON": (lines(GOOD[0]) + b"question: 1\n", r"test\.jsonl:2 is no JSON"),
    "one list for all": (json.dumps(GOOD, indent=1).encode(), r"test\.jsonl:1 is no JSON"),
    "a list": (lines(*GOOD, ["question", "answer"]), r"test\.jsonl:5 is of type list; wanted"),
    "a number": (lines(3), r"test\.jsonl:1 is of type int; wanted"),
    "latin-1": (lines(*GOOD) + '{"question": "ö", "answer": ""}'.encode("latin-1"), r"test\.jsonl:5 is no UTF-8 text"),
    "utf-16": (lines(*GOOD).decode().encode("utf-16"), r"test\.jsonl:1 is no UTF-8 text"),
    "a field missing": (lines(*GOOD, {"question": "?"}), r":5 has other fields than the first line: answer is in one"),
    "a field too many": (lines(*GOOD, GOOD[0] | {"n": 1}), r":5 has other fields than the first line: n is in one"),
    "a type of its own": (lines(*GOOD, GOOD[0] | {"answer": 7}), r"test\.jsonl:5: answer is of type int, and str before"),
    "types within": (lines({"question": ["a"]}, {"question": [1]}), r"test\.jsonl: its rows do not make one table"),
    "other fields": (
        lines({"q": "?", "a": "!"}),
        r"own_answer can't be asked with the rows of .*test\.jsonl, .*'question' is undefined.* fields are q \(str\), a \(",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_file_that_is_not_what_it_should_be_is_named(broken: str, catalogue: Catalogue, tmp_path: Path) -> None:
    content, why = BROKEN[broken]
    with pytest.raises(ValueError, match=why):
        answer_task(catalogue, tmp_path, content)


def test_the_file_with_the_examples_is_named_too(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl:2 is no JSON"):
        answer_task(catalogue, tmp_path, lines(*GOOD), lines(GOOD[0]) + b"{")
    with pytest.raises(
        ValueError, match=r"own_answer can't make a question of its example 0 .*'question' is undefined.*q \(str\)"
    ):
        answer_task(catalogue, tmp_path, lines(*GOOD), lines({"q": "?", "a": "!"}))


def test_marks_and_line_ends_of_windows_and_nulls_change_no_request(catalogue: Catalogue, tmp_path: Path) -> None:
    rows = [*GOOD, GOOD[0] | {"answer": None}]
    plain = answer_task(catalogue, tmp_path, lines(*rows))
    windows = answer_task(catalogue, tmp_path, b"\xef\xbb\xbf" + lines(*rows).replace(b"\n", b"\r\n"))
    assert [i.args for i in windows.instances] == [i.args for i in plain.instances]
    assert len(plain.instances) == 5


def test_a_text_that_looks_like_a_date_stays_a_text(catalogue: Catalogue, tmp_path: Path) -> None:
    task = answer_task(catalogue, tmp_path, lines({"question": "2020-01-01 00:00:00", "answer": "1"}))
    assert "Q: 2020-01-01 00:00:00\n" in task.instances[0].args[0]


def test_a_file_that_was_edited_is_read_anew(catalogue: Catalogue, tmp_path: Path) -> None:
    """By its content: size and time of change are those of before."""
    answer_task(catalogue, tmp_path, lines(*GOOD))
    times = ((tmp_path / "test.jsonl").stat().st_atime_ns, (tmp_path / "test.jsonl").stat().st_mtime_ns)
    (tmp_path / "test.jsonl").write_bytes(lines(*GOOD).replace(b"what", b"when"))
    os.utime(tmp_path / "test.jsonl", ns=times)
    (task,) = catalogue.load(["own_answer"], None, str(tmp_path))
    assert [document["question"][:4] for document in task.eval_docs] == ["when"] * 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"answer": 3}, "the right answer is number 3 of 3"), ({"answer": -1}, "the right answer is number -1 of 3")],
)
def test_a_right_answer_that_is_no_choice_is_said_before_anything_is_asked(
    changes: dict[str, Any], why: str, catalogue: Catalogue, own: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (own[1] / "words" / "test.jsonl").read_text().splitlines()]
    rows[4] |= changes
    write(tmp_path / "test.jsonl", rows)
    write(tmp_path / "dev.jsonl", rows[:2])
    (task,) = catalogue.load(["own_choice"], None, str(tmp_path))
    task.set_fewshot_seed(seed=0)
    build_requests(task, 4)  # the fifth is not asked for
    with pytest.raises(ValueError, match=rf"own_choice can't make a question of its document 4 \(counted from 0\): {why}"):
        build_requests(task, 5)
