"""What is said of a sweep that has ended, or is under way: what became of each job, and one table of what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mikv.columns import Column, aligned, console, fitted
from mikv.sweep.folder import SweepError, SweepFolder
from mikv.sweep.status import Job, print_count, print_jobs
from mikv.table import value_column

Row = dict[str, Any]


def print_overview(sweep: SweepFolder, jobs: Sequence[Job]) -> None:
    """The jobs' states, a table with a row per job and policy as soon as a job is finished, and what to do.

    Raises:
        SweepError: a summary can't be read.
    """
    print_jobs(sweep, jobs)
    if any(job.state == "finished" for job in jobs):
        _print_table(sweep, jobs)
    print_count(sweep, jobs)


def _print_table(sweep: SweepFolder, jobs: Sequence[Job]) -> None:
    from rich.text import Text

    rows: list[tuple[Job, Row | None]] = []
    for job in jobs:
        rows += [(job, row) for row in _summary(sweep, job)] or [(job, None)]
    first = [i for i, (job, _) in enumerate(rows) if i == 0 or rows[i - 1][0] is not job]
    options, found = sweep.differences(), [row for _, row in rows]
    metrics = {row["metric"] for row in found if row is not None}
    names = {
        "job": [str(job.number) if i in first else "" for i, (job, _) in enumerate(rows)],
        "options": [" ".join(options[job.number]) if i in first else "" for i, (job, _) in enumerate(rows)],
        "policy": ["" if row is None else row["label"] for row in found],
    }
    if len(metrics) > 1:
        names["metric"] = ["" if row is None else row["metric"].replace("_", " ") for row in found]
    columns = [
        value_column(metrics.pop() if len(metrics) == 1 else "value", found),
        Column("state", [job.state if i in first else "" for i, (job, _) in enumerate(rows)]),
        Column("size %", aligned(["" if row is None else f"{row['size_percent']:.1f}" for row in found])),
    ]
    out = console()
    table, _, left_out = fitted(
        _title(len(jobs), [row for row in found if row is not None]), names, columns, out.width, [i - 1 for i in first if i]
    )
    note = "[ ]: 95 % interval; all numbers of a job: summary.jsonl in its run's folder"
    if left_out:
        note += f"; no room here for {', '.join(left_out)}"
    table.caption = Text(note)
    out.print(table)


def _title(jobs: int, rows: Sequence[Row]) -> str:
    """What all jobs have in common; where they differ, `options` says it."""
    said = [(row["model"], row["task"], f"n = {row['n']}", f"question {row['question']}") for row in rows]
    return " · ".join([f"{jobs} jobs", *(of[0] for of in zip(*said, strict=True) if len(set(of)) == 1)])


def _summary(sweep: SweepFolder, job: Job) -> list[Row]:
    """Rows of a finished job's summary, of others none."""
    outcome = sweep.outcome(job.number)
    if job.state != "finished" or outcome is None or outcome.folder is None:
        return []
    file = Path(outcome.folder) / "summary.jsonl"
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SweepError(f"{file} can't be read ({error}); rerun the sweep after removing it") from error
