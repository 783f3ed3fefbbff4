"""From the records in a run's folder to its summary: one row per policy, of all samples that are there.

A rerun with a smaller limit or another policy must not make a summary forget what an earlier command computed: every policy and
every sample in the folder counts, whether this command asked for it or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mikv.metrics.summary import NAMES, circumstances, summarize
from mikv.records import RecordError
from mikv.work.base import Unit, Work

Row = dict[str, Any]


@dataclass(frozen=True)
class Collected:
    """What a folder holds.

    rows: of each policy, by its id, the full cache's first, then those of this command, then others; in the order of the units,
    samples that this command did not ask for behind them. more: samples that this command did not ask for. replaced: records of
    samples that have other content now; they don't count.
    """

    rows: Mapping[str, list[Row]]
    more: int = 0
    replaced: int = 0


def collect(done: Mapping[str, Row], units: Sequence[Unit], policy_ids: Sequence[str]) -> Collected:
    """Sort the records of a folder.

    Args:
        done: all records by key.
        units: of this command.
        policy_ids: of this command's panel, the full cache's first.

    Raises:
        RecordError: the summary of this command would leave out samples of other subtasks, or mix two policies of one label.
    """
    place = {unit.name: (number, unit.asked) for number, unit in enumerate(units)}
    subtasks = {unit.subtask for unit in units}
    mine: dict[str, list[Row]] = {policy_id: [] for policy_id in policy_ids}
    others: dict[str, list[Row]] = {}
    replaced = 0
    for row in done.values():
        known = place.get(row["sample"])
        if known is not None and known[1] == row["asked"]:
            mine.setdefault(row["policy_id"], []).append(row)
        elif known is not None:
            replaced += 1
        elif row["subtask"] in subtasks:
            others.setdefault(row["policy_id"], []).append(row)
        else:
            raise RecordError(
                f"the folder holds samples of {row['subtask']}, which this command leaves out: its summary would lose them. "
                "Choose another name (name=...), or ask for all of the folder's tasks"
            )
    for rows in mine.values():
        rows.sort(key=lambda row: place[row["sample"]][0])
    # samples that have other content now tell that the data has changed: then nothing is known of those not asked for
    more = {} if replaced else others
    unique = len({row["sample"] for rows in more.values() for row in rows})
    together = {policy_id: mine.get(policy_id, []) + more.get(policy_id, []) for policy_id in [*mine, *more]}
    found = {policy_id: rows for policy_id, rows in together.items() if rows}
    _check_labels(found)
    return Collected(found, unique, replaced + (sum(map(len, others.values())) if replaced else 0))


def _check_labels(rows: Mapping[str, Sequence[Row]]) -> None:
    labels = [of_policy[0]["label"] for of_policy in rows.values()]
    for label in labels:
        if labels.count(label) > 1:
            raise RecordError(
                f"the folder holds records of another policy that is called {label!r}, too: choose another name (name=...)"
            )


def summary_rows(work: Work, rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The summary of `Collected.rows`."""
    baseline = {row["sample"]: row for row in next(iter(rows.values()))}
    return [_summary_row(work, of_policy, baseline) for of_policy in rows.values()]


def _summary_row(work: Work, rows: Sequence[Row], baseline: Mapping[str, Row]) -> Row:
    if unpaired := [row["sample"] for row in rows if row["sample"] not in baseline]:
        raise RecordError(f"sample {unpaired[0]} of {rows[0]['label']} has no record of the full cache: a line was removed")
    scores = work.summarize(rows)
    return {
        **{name: rows[0][name] for name in NAMES},
        "metric": work.metric,
        "lower_is_better": work.lower_is_better,
        **summarize(rows, baseline, work.flags, scores.value, work.kind, work.lower_is_better),
        **work.columns(rows, list(baseline.values())),
        "scores": dict(scores.scores),
        "by_task": {name: dict(of_task) for name, of_task in scores.by_task.items()},
        **circumstances(rows),
    }
