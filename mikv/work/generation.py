"""Tasks as work; those that only generate: render the conversation, split it at the question, judge the answer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mikv.engine.requests import Decoding, Generating, Generation, Prompt, Response
from mikv.fingerprint import fingerprint
from mikv.identity import identity_of
from mikv.metrics.summary import Kind
from mikv.models.load import Loaded, ModelSpec
from mikv.tasks.base import Sample, Task
from mikv.tasks.prompting import encode
from mikv.work.base import Encoded, Openable, Row, Summary, Unit, Work, fidelity_row, unit_fidelity


class GenerationWork(Work):
    """Args: task; its first `limit` samples of `seed`; question, see mikv.engine."""

    lower_is_better = False
    kind: Kind = "outcome"

    def __init__(self, task: Task, limit: int | None, seed: int, question: str) -> None:
        self._task, self._question = task, question
        self.metric, self.flags = task.metric, task.flags
        self._tokenizer: Any = None
        self._samples = {sample.doc_id: sample for sample in task.samples(limit, seed)}

    def units(self) -> list[Unit]:
        return [Unit(sample.doc_id, asked=_asked(sample)) for sample in self._samples.values()]

    def encode(self, unit: Unit, loaded: Loaded) -> Encoded:
        self._tokenizer = loaded.tokenizer
        context, asked, system = encode(loaded.tokenizer, self._samples[unit.doc_id], self._question)
        prompt = Prompt(context, asked, watched=system)
        new = self._task.max_new_tokens
        if prompt.tokens + new > loaded.max_tokens:
            raise ValueError(
                f"a prompt has {prompt.tokens} tokens, plus {new} for the answer, and the model's limit is "
                f"{loaded.max_tokens}. Choose shorter prompts (fewer task.lines, task.keys) or a model with a longer "
                "context; cutting a prompt would remove what is asked for."
            )
        return Encoded([Generating(prompt, Decoding(new))])

    def outcomes(self, unit: Unit, responses: Sequence[Sequence[Response]]) -> list[Row]:
        sample = self._samples[unit.doc_id]
        rows = []
        for (generation,), fidelity in zip(responses, unit_fidelity(responses), strict=True):
            assert isinstance(generation, Generation)
            answer = self._tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
            outcome = self._task.score(sample, answer)
            rows.append(
                {
                    "answer": answer[: self._task.stored_characters],
                    "target": sample.target,
                    **sample.notes,
                    **outcome,
                    "score": float(bool(outcome["correct"])),
                    "answer_tokens": len(generation.tokens),
                    "ended": generation.ended,
                    **({"system_tiers": generation.watched_tiers} if generation.watched_tiers else {}),
                    **fidelity_row(fidelity),
                }
            )
        return rows

    def summarize(self, rows: Sequence[Row]) -> Summary:
        value = fmean(row["score"] for row in rows)
        return Summary(value, {self.metric: value}, {})


def open_task(task: Task | Openable, spec: ModelSpec, limit: int | None, seed: int, question: str) -> Work:
    """Find the task's data and make its units. Raises ValueError, OSError, DataUnavailable."""
    if isinstance(task, Openable):
        return task.open(spec, limit, seed, question)
    return GenerationWork(task, limit, seed, question)


def _asked(sample: Sample) -> str:
    """All that a sample is: what is asked, what is right, and what scoring and the record take from it."""
    return fingerprint(identity_of(sample, leave_out=("doc_id",)))
