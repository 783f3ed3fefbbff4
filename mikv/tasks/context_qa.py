"""Questions whose answer stands in the context: right, or invented, or mixed up, or not given.

Data: XQuAD's English part (arXiv:1910.11856; SQuAD's format), NQ-open with the one paragraph that holds the answer (the oracle
setting of "Lost in the Middle", arXiv:2307.03172), or any file in SQuAD's format. Prompt: that paper's, for one text instead of
search results, and LongBench's sentence that wants nothing but the answer (a talkative model's phrases are no inventions).
Right is what it is there (best_subspan_em): an answer stands in the reply's first line, both in SQuAD's normalisation.

An answer that is wrong is one of (for a reply that isn't empty, exactly one of these or right):

    abstained  it says that the text doesn't tell
    invented   it has a content word that stands nowhere in the prompt: neither in text nor question   (hallucination)
    confused   all of its content words stand there                                                    (context loss)

Content words: everything but a few English function words; numbers are words. Words are compared by their stems (Snowball), so
that "surrendered" is not invented where the question asks who "surrendered" or did "surrender".
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from mikv.tasks.base import Sample
from mikv.tasks.data import Hub, Row, Source, cluster, draw, read_rows

PROMPT = (
    "Write a high-quality answer for the given question using only the provided text. "
    "Only give me the answer and do not output any other words.\n\n{text}\n\n"
)
QUESTION = "Question: {question}\nAnswer:"
SQUAD_FIELDS: Mapping[str, type] = {"context": str, "question": str, "answers": dict}
SOURCES = {
    "xquad": Source(
        name="XQuAD (English)",
        file="xquad_en/xquad_en.jsonl",
        rows=1190,
        required=SQUAD_FIELDS,
        origin="https://github.com/google-deepmind/xquad, xquad.en.json",
        hub=Hub("google/xquad", rows=1190, split="validation", configurations=("xquad.en",)),
    ),
    "nq_open": Source(
        name="NQ-open (oracle)",
        file="lost_in_the_middle/nq_open_oracle_first500.jsonl",
        rows=500,
        required={"context": str, "question": str, "answers": list},
        origin="https://github.com/nelson-liu/lost-in-the-middle, qa_data/nq-open-oracle.jsonl.gz (its first 500 rows)",
    ),
}
_FUNCTION_WORDS = """
    a an the this that these those it its he him his she her they them their we us our you your i me my who whom whose which
    what when where why how and or but nor so if then than as at by for from in into of on onto to with without within about
    over under between through during before after is are was were be been being am do does did done has have had having will
    would can could may might must shall should not no yes there here also only just very more most such both each other any
    all some one s t d ll re ve m
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
ABSTENTION = re.compile(
    r"\b(?:can(?:no|['’])?t be (?:answered|determined)|unanswerable|unknown|unclear|unable to (?:answer|find|determine)|"
    r"(?:not|\w+n['’]t) (?:been )?(?:mentioned?|specif(?:y|ied)|provided?|stated?|given|say|tell|know|sure|enough information)|"
    r"no (?:information|mention|answer))\b",
    re.IGNORECASE,
)


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@cache
def _stemmer() -> Any:
    from nltk.stem.snowball import SnowballStemmer

    return SnowballStemmer("english")


def content_stems(text: str) -> set[str]:
    """Stems of the content words of a text. "1,000" is one word."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=\d),(?=\d)", "", text.lower()))
    return {_stemmer().stem(word) for word in words if word not in FUNCTION_WORDS}


@dataclass(frozen=True)
class ContextQA:
    """Args:
    source: xquad or nq_open.
    file: a file in SQuAD's format (JSON lines with context, question, answers.text) instead.
    data_dir: folder with the data; null = from the hub.
    max_new_tokens: limit of an answer in tokens.
    """

    name: ClassVar[str] = "context_qa"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    flags: ClassVar[tuple[str, ...]] = ("invented", "confused", "abstained")

    stored_characters: ClassVar[int | None] = None

    source: str = "xquad"
    file: str | None = None
    data_dir: str | None = None
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"task.source={self.source}: choose {' or '.join(SOURCES)}, or set task.file")

    def samples(self, limit: int | None, seed: int) -> list[Sample]:
        answered = [(doc_id, row) for doc_id, row in enumerate(self._rows()) if _answers(row)]
        return [_sample(doc_id, row) for doc_id, row in draw(answered, limit, seed, self.name)]

    def _rows(self) -> list[Row]:
        if self.file is None:
            return SOURCES[self.source].load(self.data_dir)
        file = Path(self.file).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"task.file={self.file} is no file; wanted: JSON lines with context, question, answers.text"
            )
        rows = read_rows(file, SQUAD_FIELDS)
        if unanswered := sum(not _answers(row) for row in rows):
            print(f"note: {file.name}: {unanswered} of {len(rows)} questions have no answer and are left out")
        return rows

    def score(self, sample: Sample, answer: str) -> dict[str, bool | None]:
        line = answer.split("\n")[0].strip()  # as published: else, the whole context copied would be right
        correct = any(normalized(one) in normalized(line) for one in sample.meta["answers"])
        wrong = bool(line) and not correct
        abstained = wrong and ABSTENTION.search(line) is not None
        invented = wrong and not abstained and bool(content_stems(line) - sample.meta["stems"])
        return {
            "correct": correct,
            "invented": invented,
            "confused": wrong and not abstained and not invented,
            "abstained": abstained,
        }


def _answers(row: Row) -> Sequence[str]:
    answers = row["answers"]
    return tuple(answers["text"] if isinstance(answers, dict) else answers)


def _sample(doc_id: int, row: Row) -> Sample:
    text = "\n".join(_document(row))
    question = QUESTION.format(question=row["question"])
    prompt = PROMPT.format(text=text) + question
    return Sample(
        doc_id=doc_id,
        messages=[{"role": "user", "content": prompt}],
        question=question,
        target=_answers(row)[0],
        meta={"answers": _answers(row), "stems": content_stems(prompt)},
        notes={"prompt_id": row.get("id", doc_id), "depth": _depth(row), "cluster": cluster(row["context"])},
    )


def _document(row: Row) -> Iterator[str]:
    if row.get("title"):
        yield f"(Title: {row['title']})"
    yield row["context"]


def _depth(row: Row) -> float:
    """Where in the text the answer begins, 0 to 1; 0 where it stands there in other letters only."""
    found = max(row["context"].lower().find(answer.lower()) for answer in _answers(row))
    return max(0, found) / max(1, len(row["context"]))
