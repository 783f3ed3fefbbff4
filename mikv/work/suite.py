"""Several tasks as one: they share a run, a panel and a model in memory, and their risks are told together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from mikv.engine.requests import Response
from mikv.fingerprint import fingerprint
from mikv.metrics.combine import combine
from mikv.metrics.summary import WRONG, Kind, part_rows, summarize
from mikv.models.load import Loaded, ModelSpec
from mikv.tasks.base import Task
from mikv.tasks.data import DataUnavailable
from mikv.work.base import Encoded, Openable, Row, Summary, Unit, Work, task_identity
from mikv.work.generation import open_task


@dataclass(frozen=True)
class Suite:
    """Tasks that measure the same risk.

    Args:
        name: of the suite.
        parts: its tasks, by name.
        risks: for each part the flags whose rates are the risk, or `wrong`.
        limits: for each part the number of samples, where it is not the suite's; null = the suite's.
        data_dir: folder with local data, for the parts that have none of their own; null = from the hub.
    """

    name: str
    parts: Mapping[str, Task | Openable]
    risks: Mapping[str, Sequence[str]]
    limits: Mapping[str, int | None]
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"the suite {self.name} has no parts")
        if unknown := sorted(set(self.parts) - set(self.risks)):
            raise ValueError(f"task.risks says nothing of {', '.join(unknown)}: name the flags that are a risk, or {WRONG}")

    def identity(self) -> dict[str, Any]:
        """Each part's task, with its version and parameters, is in its units' `asked`: the others don't change its answers."""
        return {"name": self.name, "version": 1}

    def scope(self) -> dict[str, Any]:
        return {"parts": {name: {"limit": self.limits.get(name), **task_identity(task)} for name, task in self.parts.items()}}

    def open(self, spec: ModelSpec, limit: int | None, seed: int, question: str) -> SuiteWork:
        works: dict[str, Work] = {}
        for name, task in self.parts.items():
            mine = self.limits.get(name)
            try:
                works[name] = open_task(self._with_data(task), spec, limit if mine is None else mine, seed, question)
            except ValueError as error:
                raise ValueError(f"{self.name}, part {name}: {error} (without this part: '~task.parts.{name}')") from error
            except DataUnavailable as error:
                without = f"  - '~task.parts.{name}'        (the suite without this part)"
                raise DataUnavailable(f"{self.name}, part {name}: {error}\n{without}") from error
        identities = {name: fingerprint(task_identity(task)) for name, task in self.parts.items()}
        return SuiteWork(works, identities, {name: tuple(self.risks[name]) for name in works})

    def _with_data(self, task: Any) -> Any:
        if self.data_dir is None or getattr(task, "data_dir", "") is not None:
            return task
        return replace(task, data_dir=self.data_dir)


class SuiteWork(Work):
    """A Suite, opened. identities: a hash of each part's task."""

    metric = "risk"
    lower_is_better = True
    kind: Kind = "number"

    def __init__(self, parts: Mapping[str, Work], identities: Mapping[str, str], risks: Mapping[str, tuple[str, ...]]) -> None:
        self.parts, self.risks = parts, risks
        for name, work in parts.items():
            if unknown := set(risks[name]) - {WRONG, *work.flags}:
                known = ", ".join([WRONG, *work.flags])
                raise ValueError(f"task.risks.{name} names {', '.join(sorted(unknown))}; the part has {known}")
        self.flags = tuple(dict.fromkeys(flag for work in parts.values() for flag in work.flags))
        self._inner: dict[Unit, tuple[str, Unit]] = {}
        for name, work in parts.items():
            for unit in work.units():
                subtask = name if unit.subtask is None else f"{name}/{unit.subtask}"
                self._inner[Unit(unit.doc_id, subtask, fingerprint({"task": identities[name], "asked": unit.asked}))] = (
                    name,
                    unit,
                )

    def units(self) -> list[Unit]:
        return list(self._inner)

    def encode(self, unit: Unit, loaded: Loaded) -> Encoded:
        name, inner = self._inner[unit]
        return self.parts[name].encode(inner, loaded)

    def outcomes(self, unit: Unit, responses: Sequence[Sequence[Response]]) -> list[Row]:
        name, inner = self._inner[unit]
        return self.parts[name].outcomes(inner, responses)

    def columns(self, rows: Sequence[Row], baseline: Sequence[Row]) -> Row:
        """The mean of the suite's risks with its error, and each part's own summary."""
        own, whole = ({name: self.rows_of(name, of) for name in self.parts} for of in (rows, baseline))
        full = {name: {row["sample"]: row for row in of} for name, of in whole.items()}
        parts: dict[str, Row] = {}
        for name, part in self.parts.items():
            scores = part.summarize(own[name])
            flags = tuple(dict.fromkeys((*part.flags, *self.risks[name])))
            parts[name] = {
                "metric": part.metric,
                "lower_is_better": part.lower_is_better,
                **summarize(own[name], full[name], flags, scores.value, part.kind, part.lower_is_better),
                "scores": dict(scores.scores),
            }
        return {**combine(own, full, parts, self.risks), "risks": dict(self.risks), "parts": parts}

    def rows_of(self, part: str, rows: Sequence[Row]) -> list[Row]:
        """The rows of a part, as it made them, with `wrong` where that is a risk."""
        return part_rows(rows, part, self.risks[part], self.parts[part].kind)

    def summarize(self, rows: Sequence[Row]) -> Summary:
        """The mean of all parts' risks, each part's metric, and its own subtasks."""
        risks: list[float] = []
        scores: dict[str, float] = {}
        by_task: dict[str, Mapping[str, Any]] = {}
        for name, work in self.parts.items():
            mine = self.rows_of(name, rows)
            summary = work.summarize(mine)
            scores[f"{name} {work.metric}"] = summary.value
            by_task |= {f"{name}/{task}": values for task, values in summary.by_task.items()}
            for risk in self.risks[name]:
                values = [float(row[risk]) for row in mine if row.get(risk) is not None]
                risks += [fmean(values)] if values else []
        return Summary(fmean(risks) if risks else float("nan"), scores, by_task)
