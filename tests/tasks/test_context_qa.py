"""Questions whose answer stands in the context: prompts, the published rule, and what a wrong answer is called."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import own_rows
import pytest
from conftest import SHARED_DATA

from mikv.tasks.base import Sample
from mikv.tasks.context_qa import ContextQA, content_stems, normalized

OUTCOMES = ("correct", "invented", "confused", "abstained")


def sample(folder: Path) -> Sample:
    """In 1050 the harbour of Oldport was built by a baker. The boats came later."""
    task = ContextQA(data_dir=own_rows.write(folder))
    return next(sample for sample in task.samples(None, 0) if sample.doc_id == 0)


def outcome(sample: Sample, answer: str) -> str | None:
    scored = ContextQA().score(sample, answer)
    assert set(scored) == set(OUTCOMES) == {"correct", *ContextQA.flags}
    (found,) = [name for name in OUTCOMES if scored[name]] or [None]
    return found


def test_the_prompt_is_the_text_and_then_the_question(tmp_path: Path) -> None:
    asked = sample(tmp_path)
    assert asked.messages[0]["content"] == (
        "Write a high-quality answer for the given question using only the provided text. "
        "Only give me the answer and do not output any other words.\n\n"
        "(Title: Harbours)\nIn 1050 the harbour of Oldport was built by a baker. The boats came later.\n\n"
        "Question: When was the harbour built?\nAnswer:"
    )
    assert asked.question == "Question: When was the harbour built?\nAnswer:"
    assert (asked.target, asked.notes["prompt_id"]) == ("1050", "q0")
    assert asked.notes["depth"] == pytest.approx(3 / 75, abs=1e-3)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("1050", "correct"),
        ("It was built in 1,050.", "correct"),
        ("The year 1050, I think, by aliens", "correct"),  # an answer within more words, as published
        ("11050", "correct"),  # within another number even: as published
        ("Sorry\n1050", "invented"),  # only the first line counts
        ("1051", "invented"),
        ("It was built in 1051 by a baker.", "invented"),
        ("by a baker", "confused"),
        ("Boats came to the harbours of Oldport", "confused"),  # inflections of words that stand there
        ("The boat builders", "invented"),
        ("The answer to the given question is: later.", "confused"),  # words of the prompt are no inventions
        ("...", "confused"),
        ("The text doesn't say.", "abstained"),
        ("This cannot be answered.", "abstained"),
        ("The year is not mentioned in the passage.", "abstained"),
        ("I don't know", "abstained"),
        ("There is no information about it", "abstained"),
        ("1050, but it is not stated", "correct"),
        ("", None),
        ("\n1050", None),
    ],
)
def test_an_answer_is_one_thing(answer: str, wanted: str | None, tmp_path: Path) -> None:
    assert outcome(sample(tmp_path), answer) == wanted


def test_whatever_is_said_is_one_thing(tmp_path: Path) -> None:
    asked = sample(tmp_path)
    parts = ("1050", "boats", "pelican", "is not mentioned", "!")
    for some in product(parts, repeat=3):
        assert outcome(asked, " ".join(some)) is not None


def test_any_of_the_answers_will_do_and_articles_and_points_do_not_count(tmp_path: Path) -> None:
    task = ContextQA("nq_open", data_dir=own_rows.write(tmp_path))
    for one in task.samples(None, 0):
        assert task.score(one, "It was A BAKER!")["correct"]
        assert not task.score(one, "It was a bakery? No: bake.")["abstained"]
    assert normalized("The  U.S.'s -- an Apple, a day") == "uss apple day"


def test_content_words_are_stems_without_function_words() -> None:
    assert content_stems("The Panthers have surrendered 1,308 points; it's SURRENDER!") == {
        "panther",
        "surrend",
        "1308",
        "point",
    }
    assert content_stems("Élan über naïve_words") == {*content_stems("élan"), *content_stems("über naïve words")}


def test_a_file_in_squads_format_does_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    row = {"context": "Cats purr.", "question": "Who purrs?", "answers": {"text": ["Cats"]}}
    file.write_text(json.dumps({**row, "answers": {"text": []}}) + "\n" + json.dumps(row) + "\n")
    (only,) = ContextQA(file=str(file)).samples(None, 0)
    assert "1 of 2 questions have no answer and are left out" in capsys.readouterr().out
    assert only.messages[0]["content"].endswith("words.\n\nCats purr.\n\nQuestion: Who purrs?\nAnswer:")
    assert (only.doc_id, only.notes["prompt_id"], only.notes["depth"]) == (1, 1, 0.0)


def test_questions_about_one_text_are_a_cluster(tmp_path: Path) -> None:
    first, second = own_rows.ROWS["xquad_en/xquad_en.jsonl"][:2]
    data = own_rows.write(tmp_path, {"xquad_en/xquad_en.jsonl": [first, {**first, "question": "By whom?"}, second]})
    clusters = {sample.doc_id: sample.notes["cluster"] for sample in ContextQA(data_dir=data).samples(None, 0)}
    assert clusters[0] == clusters[1] != clusters[2]
    assert "harbour" not in str(clusters)


def test_what_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.source=bread: choose xquad or nq_open, or set task\.file"):
        ContextQA("bread")
    with pytest.raises(FileNotFoundError, match=r"task\.file=.*none\.jsonl is no file; wanted: JSON lines"):
        ContextQA(file=str(tmp_path / "none.jsonl")).samples(1, 0)


@pytest.mark.parametrize("source", ["xquad", "nq_open"])
def test_published_answers_are_right(source: str) -> None:
    if not (SHARED_DATA / "xquad_en").is_dir():
        pytest.skip(f"published files are not in {SHARED_DATA}")
    task = ContextQA(source, data_dir=str(SHARED_DATA))
    samples = task.samples(None, 0)
    assert all(task.score(one, one.target)["correct"] for one in samples)
    if source == "xquad":
        assert all(one.notes["depth"] > 0 or one.target in one.messages[0]["content"] for one in samples)
