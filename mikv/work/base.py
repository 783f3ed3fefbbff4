"""The contract between a run and a task of any kind.

A *unit* is one sample: it makes one or several requests to the engine, and its responses become one record per policy. A
generation task (mikv.tasks.base.Task) needs none of this: mikv.work.generation does it for all of them. A task that scores
log-likelihoods, or brings samples and metrics of its own, has a method `open`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mikv.engine.requests import Fidelity, Generation, Request, Response, Scores
from mikv.fingerprint import content_fingerprint
from mikv.identity import identity_of
from mikv.metrics.summary import Kind
from mikv.models.load import Loaded, ModelSpec
from mikv.tasks.base import Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One sample.

    doc_id: within its subtask, or within the task; subtask: for a task that is made of several; asked: a hash of what is
    asked, where the task's own identity does not say it all.
    """

    doc_id: int
    subtask: str | None = None
    asked: str | None = None

    @property
    def name(self) -> str:
        return str(self.doc_id) if self.subtask is None else f"{self.subtask}/{self.doc_id}"


@dataclass(frozen=True)
class Encoded:
    """A unit's requests. cut_tokens: how many tokens of its prompts did not fit the model and were cut on the left."""

    requests: Sequence[Request]
    cut_tokens: int = 0


@dataclass(frozen=True)
class Summary:
    """What a policy's rows amount to. value: the task's metric; scores: all metrics, by name, for the table; by_task: the same
    and more, by subtask and group, where there are any."""

    value: float
    scores: Mapping[str, float]
    by_task: Mapping[str, Mapping[str, Any]]


class Work(Protocol):
    """A task, opened: its samples are known, its data are there. To be inherited from."""

    metric: str
    """Name of the metric that decides: higher is better unless `lower_is_better`."""
    lower_is_better: bool
    kind: Kind
    """What a sample's `score` is: known from what is measured, not from the values that came out."""
    flags: tuple[str, ...]
    """Boolean outcomes whose rates are reported."""

    def units(self) -> Sequence[Unit]: ...

    def encode(self, unit: Unit, loaded: Loaded) -> Encoded:
        """A unit's requests, as token ids. Raises ValueError where it can't be asked of this model."""
        ...

    def outcomes(self, unit: Unit, responses: Sequence[Sequence[Response]]) -> list[Row]:
        """For each policy what goes into its record, from its responses to the requests that `encode` made.

        `score` (a number, or None where the metric is no mean over samples), `answer`, `target`, flags, fidelity.
        """
        ...

    def summarize(self, rows: Sequence[Row]) -> Summary:
        """From the rows of one policy, as `outcomes` made them or as they were read from the records."""
        ...

    def columns(self, rows: Sequence[Row], baseline: Sequence[Row]) -> Row:
        """What a policy's summary says besides, from its rows and the full cache's; of most tasks nothing."""
        return {}


@runtime_checkable
class Openable(Protocol):
    """A task that knows how to become work."""

    name: str

    def open(self, spec: ModelSpec, limit: int | None, seed: int, question: str) -> Work:
        """Find the data and make the units. Raises ValueError, OSError, DataUnavailable."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What of the task changes an outcome, besides the unit."""
        ...

    def scope(self) -> Mapping[str, Any]:
        """What of the task only chooses the samples."""
        ...


def task_identity(task: Task | Openable) -> dict[str, Any]:
    """Name, version and parameters. A file is what it holds, not where it lies; of a folder with data, each unit's `asked`
    says what they hold."""
    if isinstance(task, Openable):
        return dict(task.identity())
    parameters = identity_of(task, leave_out=("data_dir",))
    for name, value in parameters.items():
        if isinstance(value, str) and os.path.isfile(value):  # Path.is_file raises where a text is too long for a path
            parameters[name] = content_fingerprint(Path(value))
    return {"name": task.name, "version": task.version, "metric": task.metric, **parameters}


def fidelity_row(fidelity: Fidelity | None) -> Row:
    """Columns of a record; none where fidelity was not measured."""
    return {} if fidelity is None else fidelity._asdict()


def baseline_choice(responses: Sequence[Response]) -> tuple[int, int]:
    """What the full cache answers when continuations are scored: (request, continuation) of the highest log-probability."""
    return max(
        (
            (r, c)
            for r, response in enumerate(responses)
            if isinstance(response, Scores)
            for c in range(len(response.continuations))
        ),
        key=lambda place: _scores(responses[place[0]]).continuations[place[1]].logprob,
    )


def unit_fidelity(responses: Sequence[Sequence[Response]]) -> list[Fidelity | None]:
    """Each policy's fidelity on the full cache's (the first policy's) answer to a unit."""
    baseline = responses[0]
    if all(isinstance(response, Scores) for response in baseline):
        request, continuation = baseline_choice(baseline)
        return [_scores(mine[request]).continuations[continuation].fidelity for mine in responses]
    return [next(r.fidelity for r in mine if isinstance(r, Generation)) for mine in responses]


def _scores(response: Response) -> Scores:
    assert isinstance(response, Scores)
    return response
