"""MemoTrap (liujch1998/memo-trap, of the Inverse Scaling Prize, arXiv:2306.09479): does the model do as told where a proverb
that it knows by heart says otherwise?

Each prompt asks for an ending that is not the proverb's. Both endings are scored as continuations; right is where the one asked
for is likelier, `memorized` where it is the proverb's. Prompts are as published, without a chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from mikv.engine.requests import Prompt, Response, Scores, Scoring
from mikv.fingerprint import fingerprint
from mikv.metrics.summary import Kind
from mikv.models.load import Loaded, ModelSpec
from mikv.tasks.data import Row as DataRow
from mikv.tasks.data import Source, draw
from mikv.work.base import Encoded, Row, Summary, Unit, Work, fidelity_row, unit_fidelity

_FILES = {"ending": ("1-proverb-ending", 860), "translation": ("2-proverb-translation", 843)}
SOURCES = {
    part: Source(
        name=f"MemoTrap, {part}",
        file=f"memo_trap/{file}.jsonl",
        rows=rows,
        required={"prompt": str, "choices": list, "answer": int},
        origin=f"https://github.com/liujch1998/memo-trap, data/{file}.csv",
    )
    for part, (file, rows) in _FILES.items()
}


@dataclass(frozen=True)
class MemoTrap:
    """Args:
    part: ending (write a quote that ends in ...) or translation (of a changed proverb).
    data_dir: folder with the data.
    """

    name: ClassVar[str] = "memo_trap"

    part: str = "ending"
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if self.part not in SOURCES:
            raise ValueError(f"task.part={self.part}: choose {' or '.join(SOURCES)}")

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "version": 1, "part": self.part}

    def scope(self) -> dict[str, Any]:
        return {}

    def open(self, spec: ModelSpec, limit: int | None, seed: int, question: str) -> MemoTrapWork:
        if question != "visible":
            raise ValueError(
                f"protocol.question={question}: MemoTrap's prompts have no question apart; use protocol.question=visible"
            )
        rows = list(enumerate(SOURCES[self.part].load(self.data_dir)))
        return MemoTrapWork(dict(draw(rows, limit, seed, f"{self.name} {self.part}")))


class MemoTrapWork(Work):
    """A MemoTrap, opened. rows: by number."""

    metric = "accuracy"
    lower_is_better = False
    kind: Kind = "outcome"
    flags: tuple[str, ...] = ("memorized",)

    def __init__(self, rows: Mapping[int, DataRow]) -> None:
        self._rows = rows

    def units(self) -> list[Unit]:
        return [Unit(doc_id, asked=fingerprint(row)) for doc_id, row in self._rows.items()]

    def encode(self, unit: Unit, loaded: Loaded) -> Encoded:
        row = self._rows[unit.doc_id]
        context = loaded.tokenizer(row["prompt"])["input_ids"]
        endings = [loaded.tokenizer(row["prompt"] + choice)["input_ids"][len(context) :] for choice in row["choices"]]
        longest = len(context) + max(map(len, endings))
        if longest > loaded.max_tokens:
            raise ValueError(f"a prompt with its ending has {longest} tokens and the model's limit is {loaded.max_tokens}")
        return Encoded([Scoring(Prompt(context[:-1], context[-1:]), endings)])

    def outcomes(self, unit: Unit, responses: Sequence[Sequence[Response]]) -> list[Row]:
        row = self._rows[unit.doc_id]
        rows = []
        for (scores,), fidelity in zip(responses, unit_fidelity(responses), strict=True):
            assert isinstance(scores, Scores)
            logprobs = [continuation.logprob for continuation in scores.continuations]
            said = max(range(len(logprobs)), key=logprobs.__getitem__)
            correct = said == row["answer"]
            rows.append(
                {
                    "answer": row["choices"][said],
                    "target": row["choices"][row["answer"]],
                    "logprobs": logprobs,
                    "correct": correct,
                    "memorized": not correct,
                    "score": float(correct),
                    **fidelity_row(fidelity),
                }
            )
        return rows

    def summarize(self, rows: Sequence[Row]) -> Summary:
        value = fmean(row["score"] for row in rows)
        return Summary(value, {self.metric: value}, {})
