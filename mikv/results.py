"""Reading of runs' folders, for the report, the tracker and the notebooks. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mikv.records import read_environments, read_rows

if TYPE_CHECKING:  # the report and the tracker do without it
    import pandas as pd

Row = dict[str, Any]

NEEDED = {"policy", "label", "model", "task", "question", "metric", "value", "ci95", "n", "samples", "size_percent", "rates"}


class ResultsError(RuntimeError):
    """A folder holds no results that can be read; the message says why, and what to do."""


@dataclass(frozen=True)
class Results:
    """One run.

    summary: a row per policy, the full cache first; samples: a row per policy and sample (of a kept result set: the flipped
    ones alone); about: as in run.json, with the identity; environments: of the processes that made the samples; config: the
    resolved configuration as YAML, where it is kept.
    """

    name: str
    summary: list[Row]
    samples: list[Row]
    about: Row
    environments: Mapping[str, Row]
    config: str

    @property
    def full_label(self) -> str:
        """Label of the full cache."""
        return str(self.summary[0]["label"])


def read_results(folder: Path) -> Results:
    """The results in the folder of a run.

    Raises:
        ResultsError, RecordError: there are none, or others than this program writes.
    """
    file = folder / "summary.jsonl"
    if not file.is_file():
        raise ResultsError(
            f"{folder} holds no results: there is no summary.jsonl in it. Give the folder of a run that has ended, which the "
            "run prints at its end; one that was interrupted goes on with the same command."
        )
    try:
        summary = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lacking = NEEDED - summary[0].keys()
        current = not lacking and all(isinstance(rate, dict) for row in summary for rate in row["rates"].values())
    except (ValueError, IndexError, AttributeError) as error:
        raise ResultsError(f"{file} is damaged ({error}); the same command as before writes it anew") from error
    samples = list(read_rows(folder / "samples.jsonl")) if (folder / "samples.jsonl").is_file() else []
    if not current or any("sample" not in row for row in samples):
        raise ResultsError(
            f"{folder} was written by an older version ({', '.join(sorted(lacking)) or 'rates without intervals'} missing): "
            "run it again under another name (name=...)"
        )
    about, config = folder / "run.json", folder / "config.yaml"
    return Results(
        name=folder.resolve().name,
        summary=summary,
        samples=samples,
        about=json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {},
        environments=read_environments(folder),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def panel_of(folder: Path) -> str | None:
    """Name of the panel that a run was made with; None = a single policy, or nothing is known."""
    import yaml

    config, about = folder / "config.yaml", folder / "run.json"
    if config.is_file():
        return (yaml.safe_load(config.read_text(encoding="utf-8")).get("panel") or {}).get("name")
    return json.loads(about.read_text(encoding="utf-8")).get("panel") if about.is_file() else None


def flips(results: Results) -> Iterator[tuple[Row, Row]]:
    """Samples whose outcome is another one than with the full cache: its row there, and the policy's, in the order of the
    summary. Only outcomes that are right or wrong flip; a divergence always differs."""
    of_full = {row["sample"]: row for row in results.samples if row["label"] == results.full_label}
    for point in results.summary[1:]:
        for row in results.samples:
            if row["label"] == point["label"] and row["sample"] in of_full:
                scores = {of_full[row["sample"]].get("score"), row.get("score")}
                if scores == {0.0, 1.0}:
                    yield of_full[row["sample"]], row


def measures(row: Mapping[str, Any]) -> dict[str, Row]:
    """All that was measured of a policy, by name: each with value, n, ci95 (or None), lower_is_better, and, where there is a
    full cache, difference (in the measure's unit), difference_ci95, mcnemar_p, lost, gained. The task's metric comes first."""
    found = {str(row["metric"]): {**row, "lower_is_better": row.get("lower_is_better", False)}}
    for name, lower in (("kl", True), ("agreement", False), ("nll_change", True)):
        if name in row and name not in found:
            found[name] = {"value": row[name], "n": row["samples"], "ci95": row.get(f"{name}_ci95"), "lower_is_better": lower}
    for part, of_part in ({"": row} | row.get("parts", {})).items():
        for flag, rate in of_part["rates"].items():
            found[f"{part} {flag}".strip()] = {**rate, "lower_is_better": True}
    kept = ("value", "n", "ci95", "lower_is_better", "difference", "difference_ci95", "mcnemar_p", "lost", "gained")
    return {name: {key: of[key] for key in kept if key in of} for name, of in found.items()}


def frame(folders: Iterable[Path]) -> pd.DataFrame:
    """Everything that these runs measured, a row per run, policy and measure: run, model, task (with the options in which its
    runs differ), policy, label, size_percent, measure, first (is it the task's metric), and the fields of `measures`."""
    import pandas as pd

    runs = [read_results(folder) for folder in folders]
    rows = []
    for results, task in zip(runs, _told_apart(runs), strict=True):
        for point in results.summary:
            head = {name: point[name] for name in ("model", "policy", "label", "size_percent")}
            for i, (name, of) in enumerate(measures(point).items()):
                rows.append({"run": results.name, "task": task, **head, "measure": name, "first": i == 0, **of})
    return pd.DataFrame(rows)


def _told_apart(runs: Sequence[Results]) -> list[str]:
    """Each run's task, with the options in which runs of that task differ: records of 10 and of 40 lines are no one curve."""
    asked: list[Row] = []
    for results in runs:
        identity = results.about.get("identity", {})
        asked.append({**identity.get("task", {}), "question": identity.get("protocol", {}).get("question")})
    tasks = [str(results.summary[0]["task"]) for results in runs]
    names = []
    for task, mine in zip(tasks, asked, strict=True):
        others = [other for name, other in zip(tasks, asked, strict=True) if name == task]
        differing = [option for option in mine if any(other.get(option) != mine[option] for other in others)]
        names.append(" ".join([task, *(f"{option}={mine[option]}" for option in differing)]))
    return names
