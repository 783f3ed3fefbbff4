"""lm-eval's tasks: found by name, with local data or a message that says how to get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import SHARED_DATA
from lm_eval.api.group import Group
from own_tasks import write

from mikv.lm.humaneval import HUMANEVAL
from mikv.lm.tasks import Catalogue
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
