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
    question has been seen. `meta` is what scoring needs, `notes` go into the record (id, category, depth, ...).
    """

    doc_id: int
    messages: Sequence[Message]
    question: str
    target: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages or not self.messages[-1]["content"].endswith(self.question):
            raise ValueError(f"sample {self.doc_id}: the last message must end with the question")


class Task(Protocol):
    """A generation task. `version` is raised whenever prompts or scoring change: old records then stay apart."""

    name: ClassVar[str]
    version: ClassVar[int]
    metric: ClassVar[str]
    max_new_tokens: int

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the boolean outcomes that `score` returns besides `correct`."""
        ...

    @property
    def stored_characters(self) -> int | None:
        """How much of an answer may be kept in a record; None = all of it."""
        ...

    def samples(self, limit: int | None, seed: int) -> list[Sample]:
        """The first `limit` samples (None = all that there are; ValueError where there is no end to them).

        The same seed gives the same samples, whatever the limit. Raises DataUnavailable, ValueError, OSError.
        """
        ...

    def score(self, sample: Sample, answer: str) -> dict[str, bool | None]:
        """Outcome of one answer: `correct`, and those of `flags` that can happen to this sample (None or absent = can't: a
        rate counts only the samples in which its outcome was possible)."""
        ...


class Judge(Protocol):
    """Decides whether an answer complies with a request, where a list of phrases is not enough."""

    def verdict(self, prompt: str, answer: str) -> bool | None:
        """Does the answer do what the prompt asks for? None = the judge's reply can't be read."""
        ...


MOST_CHARACTERS = 2 * 10**8
"""Of all samples that a task makes: about 50 million tokens, 2 GB of memory. All are encoded before the first is asked."""


def endless(limit: int | None, characters: int) -> int:
    """The limit of a task that makes its samples, of about so many characters each.

    Raises:
        ValueError: no limit, or more than a machine holds.
    """
    if limit is None:
        raise ValueError("task.limit=null: this task makes as many samples as are asked for; set task.limit")
    if limit * characters > MOST_CHARACTERS:
        raise ValueError(
            f"task.limit={limit}: as many samples of about {characters} characters do not fit the memory; at most "
            f"task.limit={max(1, MOST_CHARACTERS // characters)}"
        )
    return limit
