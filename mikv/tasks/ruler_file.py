"""RULER's niah_multikey_3 (arXiv:2404.06654) as published: one UUID to be found among hundreds of others, about 4,000 tokens.

Samples come from a file or the hub, made once for some tokenizer (task=ruler makes them for the model's own). The prompt ends
in RULER's answer prefix, which the model goes on from; scoring is RULER's string_match_all. A wrong answer may be confused
(another key's value) or invented (something like a UUID that stands nowhere).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from mikv.tasks.base import Sample
from mikv.tasks.data import Hub, Row, Source, draw
from mikv.tasks.key_value import value_outcome

NEEDLE = re.compile(r"^One of the special magic uuids for (?P<key>\S+) is: (?P<value>\S+)\.$", re.MULTILINE)
SOURCE = Source(
    name="RULER niah_multikey_3, 4096 tokens",
    file="ruler_4096/niah_multikey_3_first200.jsonl",
    rows=200,
    required={"input": str, "outputs": list, "gen_prefix": str},
    origin="https://github.com/Zefan-Cai/KVCache-Factory (made by https://github.com/NVIDIA/RULER)",
    hub=Hub(
        "simonjegou/ruler",
        rows=500,
        split="test",
        configurations=("4096",),
        fields={"input": ("context", "question"), "outputs": "answer", "gen_prefix": "answer_prefix"},
        only=("task", "niah_multikey_3"),
    ),
)


@dataclass(frozen=True)
class RulerFile:
    """Args:
    data_dir: folder with the data; null = from the hub.
    max_new_tokens: limit of an answer in tokens (RULER's for this task).
    """

    name: ClassVar[str] = "ruler_file"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    flags: ClassVar[tuple[str, ...]] = ("confused", "invented")

    stored_characters: ClassVar[int | None] = None

    data_dir: str | None = None
    max_new_tokens: int = 128

    def samples(self, limit: int | None, seed: int) -> list[Sample]:
        rows = list(enumerate(SOURCE.load(self.data_dir)))
        return [_sample(doc_id, row) for doc_id, row in draw(rows, limit, seed, self.name)]

    def score(self, sample: Sample, answer: str) -> dict[str, bool | None]:
        return value_outcome(answer, sample.target, sample.meta["values"], sample.meta["known"])


def _sample(doc_id: int, row: Row) -> Sample:
    text = row["input"].rstrip()
    asked = text[text.rindex("\n") + 1 :]
    question = f"{asked} {row['gen_prefix'].strip()}"
    needles = [(match["key"], match["value"]) for match in NEEDLE.finditer(text)]
    (target,) = row["outputs"]
    values = tuple(value for _, value in needles)
    if target not in values:
        raise ValueError(f"{SOURCE.name}, row {doc_id}: the answer is the value of no key")
    return Sample(
        doc_id=doc_id,
        messages=[{"role": "user", "content": text.removesuffix(asked) + question}],
        question=question,
        target=target,
        meta={"values": values, "known": tuple(part for needle in needles for part in needle)},
        notes={"prompt_id": row.get("index", doc_id), "keys": len(needles), "depth": values.index(target) / (len(values) - 1)},
    )
