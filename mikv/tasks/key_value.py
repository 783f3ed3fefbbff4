"""Key-value retrieval of "Lost in the Middle" (arXiv:2307.03172): the value of one key of a JSON object of random UUIDs.

Prompt, object and scoring ("the value stands in the answer, ignoring case") are those of nelson-liu/lost-in-the-middle. A wrong
answer may be

    confused   it tells another key's value                       (context loss)
    invented   it tells something like a UUID that stands nowhere   (hallucination)
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mikv.tasks.base import Sample, endless
from mikv.tasks.data import Source, draw

PROMPT = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{{{records}}}\n\n"
QUESTION = 'Key: "{key}"\nCorresponding value:'
PUBLISHED_KEYS = 75
MOST_KEYS = 10**5  # seven million tokens
_CHARACTERS = 85  # of a key and its value
SOURCE = Source(
    name="key-value retrieval, 75 keys",
    file="lost_in_the_middle/kv_retrieval_75_keys_first200.jsonl",
    rows=200,
    required={"ordered_kv_records": list, "key": str, "value": str},
    origin="https://github.com/nelson-liu/lost-in-the-middle, kv_retrieval_data/*75_keys.jsonl.gz (first 200 rows)",
)
LIKE_A_UUID = re.compile(r"\b(?=[a-f-]*\d)[0-9a-f]{3,}(?:-[0-9a-f]{2,})+\b", re.IGNORECASE)  # garbled and short ones too


def value_outcome(answer: str, value: str, values: Sequence[str], known: Sequence[str]) -> dict[str, bool | None]:
    """Is the value told; if not, is another one, or one that stands nowhere? `known` is all that stands there.

    What an answer's limit of tokens cut off is no invention: the beginning of something known.
    """
    correct = value.lower() in answer.lower()
    told = set() if correct else {found.lower() for found in LIKE_A_UUID.findall(answer)}
    return {
        "correct": correct,
        "confused": bool(told & {one.lower() for one in values}),
        "invented": any(not any(one.lower().startswith(found) for one in known) for found in told),
    }


@dataclass(frozen=True)
class KeyValue:
    """Args:
    keys: of the object (75 keys are about 5,500 tokens). With `data_dir`, 75.
    data_dir: folder with the published samples; null = made from the seed.
    max_new_tokens: limit of an answer in tokens (100 in the paper).
    """

    name: ClassVar[str] = "key_value"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    flags: ClassVar[tuple[str, ...]] = ("confused", "invented")

    stored_characters: ClassVar[int | None] = None

    keys: int = PUBLISHED_KEYS
    data_dir: str | None = None
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= MOST_KEYS:
            raise ValueError(f"task.keys={self.keys}: from 2 to {MOST_KEYS}")
        if self.data_dir is not None and self.keys != PUBLISHED_KEYS:
            raise ValueError(
                f"task.keys={self.keys} with task.data_dir: the published samples have {PUBLISHED_KEYS} keys; without "
                "task.data_dir objects of any size are made"
            )

    def samples(self, limit: int | None, seed: int) -> list[Sample]:
        if self.data_dir is None:
            return [self._made(doc_id, seed) for doc_id in range(endless(limit, _CHARACTERS * self.keys))]
        rows = list(enumerate(SOURCE.load(self.data_dir)))
        return [
            _sample(doc_id, [(key, value) for key, value in row["ordered_kv_records"]], row["key"])
            for doc_id, row in draw(rows, limit, seed, self.name)
        ]

    def _made(self, doc_id: int, seed: int) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{doc_id}")  # a str seed: the same on every machine and Python
        records = [(_uuid(rng), _uuid(rng)) for _ in range(self.keys)]
        return _sample(doc_id, records, rng.choice(records)[0])

    def score(self, sample: Sample, answer: str) -> dict[str, bool | None]:
        records = sample.meta["records"]
        values = [value for _, value in records]
        return value_outcome(answer, sample.target, values, [text for record in records for text in record])


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _sample(doc_id: int, records: Sequence[tuple[str, str]], key: str) -> Sample:
    listed = ",\n ".join(f'"{name}": "{value}"' for name, value in records)
    asked = [name for name, _ in records].index(key)
    question = QUESTION.format(key=key)
    return Sample(
        doc_id=doc_id,
        messages=[{"role": "user", "content": PROMPT.format(records=listed) + question}],
        question=question,
        target=records[asked][1],
        meta={"records": tuple(records)},
        notes={"keys": len(records), "depth": asked / (len(records) - 1)},
    )
