"""How far does a policy's cache move the model's next-token distributions, on running text?

The most sensitive measure there is, and it needs no model that can solve a task: a window's context is prefilled and
compressed, its tail is teacher-forced through every policy's cache, and each prediction is compared with the full cache's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from mikv.engine.requests import Prompt, Response, Scores, Scoring
from mikv.fingerprint import content_fingerprint
from mikv.metrics.summary import Kind
from mikv.models.load import Loaded, ModelSpec, load_tokenizer
from mikv.work.base import Encoded, Row, Summary, Unit, Work, fidelity_row, unit_fidelity

_FOLDER = Path(__file__).parent.parent / "texts"
TEXTS = {
    "prose": _FOLDER
    / "founding_documents.txt",  # the United States' Declaration of Independence and Constitution: public domain
    "code": _FOLDER / "source_code.txt",  # modules of this package
}


@dataclass(frozen=True)
class TextFidelity:
    """Windows of a text, one after the other, without overlap.

    Args:
        text: prose or code, which come with the project, or a UTF-8 text file.
        context: tokens that are prefilled and compressed (the last of them is held back and fed first).
        tail: tokens after them that are fed and compared.
    """

    name: ClassVar[str] = "fidelity"

    text: str = "prose"
    context: int = 512
    tail: int = 128

    def __post_init__(self) -> None:
        for name, value, least in (("context", self.context, 2), ("tail", self.tail, 1)):
            if value < least:
                raise ValueError(f"task.{name}={value}: at least {least}")
        if not self._file.is_file():
            raise FileNotFoundError(f"task.text={self.text}: there is no such file; wanted one, or {' or '.join(TEXTS)}")

    @property
    def _file(self) -> Path:
        return TEXTS.get(self.text) or Path(self.text).expanduser()

    def identity(self) -> dict[str, Any]:
        text = content_fingerprint(self._file)
        return {"name": self.name, "version": 1, "text": text, "context": self.context, "tail": self.tail}

    def scope(self) -> dict[str, Any]:
        return {}

    def open(self, spec: ModelSpec, limit: int | None, seed: int, question: str) -> TextWork:
        if question != "visible":
            raise ValueError(f"protocol.question={question}: a text asks no question; use protocol.question=visible")
        try:
            text = self._file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"task.text={self.text} is no UTF-8 text ({error})") from error
        tokenizer = load_tokenizer(spec)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        step = self.context - len(start) + self.tail
        windows = [[*start, *tokens[i : i + step]] for i in range(0, len(tokens) - step + 1, step)]
        if not windows:
            raise ValueError(
                f"{self._file} has {len(tokens)} tokens, and one window needs {step}: choose a longer text, or a smaller "
                "task.context or task.tail"
            )
        if limit is not None and limit > len(windows):
            print(f"note: {self._file.name} has {len(windows)} windows of {step} tokens, {limit} were asked for")
        return TextWork(self, windows[:limit])


class TextWork(Work):
    """A TextFidelity, opened. windows: token ids, context and tail."""

    metric = "kl"
    lower_is_better = True
    kind: Kind = "divergence"
    flags: tuple[str, ...] = ()

    def __init__(self, task: TextFidelity, windows: Sequence[Sequence[int]]) -> None:
        self._task, self._windows = task, windows

    def units(self) -> list[Unit]:
        return [Unit(i) for i in range(len(self._windows))]

    def encode(self, unit: Unit, loaded: Loaded) -> Encoded:
        window = self._windows[unit.doc_id]
        if len(window) > loaded.max_tokens:
            raise ValueError(
                f"a window has {len(window)} tokens and the model's limit is {loaded.max_tokens}: less task.context"
            )
        context, tail = window[: self._task.context], window[self._task.context :]
        return Encoded([Scoring(Prompt(context[:-1], context[-1:]), [tail])])

    def outcomes(self, unit: Unit, responses: Sequence[Sequence[Response]]) -> list[Row]:
        rows = []
        for (scores,), fidelity in zip(responses, unit_fidelity(responses), strict=True):
            assert isinstance(scores, Scores)
            assert fidelity is not None
            rows.append({"score": fidelity.kl, "logprob": scores.continuations[0].logprob, **fidelity_row(fidelity)})
        return rows

    def summarize(self, rows: Sequence[Row]) -> Summary:
        value = fmean(row["score"] for row in rows)
        return Summary(value, {self.metric: value}, {})
