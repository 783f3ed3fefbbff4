"""The task contract: samples in, outcomes out.

A task knows nothing of models, caches or policies. It yields `Sample`s and judges answers; a generation task is any
class with the methods of `Task`. Adding one is a file here and a YAML in conf/task/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass(frozen=True)
class Sample:
    """One question to the model.

    `messages` is the conversation up to the model's turn; its last message is the user's and ends with `question`.
    Everything before `question` is context: with `protocol.question=hidden` the cache is compressed before the
    question has been seen.
    """

    doc_id: int
    messages: Sequence[Message]
    question: str
    target: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages or not self.messages[-1]["content"].endswith(self.question):
            raise ValueError(f"sample {self.doc_id}: the last message must end with the question")


class Task(Protocol):
    """A generation task. `version` is raised whenever prompts or scoring change: old records then stay apart."""

    name: ClassVar[str]
    version: ClassVar[int]
    metric: ClassVar[str]
    flags: ClassVar[tuple[str, ...]]  # names of the boolean outcomes that `score` returns besides `correct`
    max_new_tokens: int

    def samples(self, limit: int, seed: int) -> list[Sample]:
        """The first `limit` samples; the same seed gives the same samples, whatever the limit."""
        ...

    def score(self, sample: Sample, answer: str) -> dict[str, bool]:
        """Outcome of one answer: `correct`, and each of `flags`."""
        ...
