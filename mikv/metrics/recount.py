"""Does a summary say what its samples do? Counted again, field by field: a score that was edited by hand, a line that went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mikv.metrics.summary import part_rows, summarize

Row = dict[str, Any]

# Of a suite these are made of its parts' rates, see mikv.metrics.summary.combine.
_COMBINED = ("value", "stderr", "ci95", "difference", "difference_stderr", "difference_ci95", "mcnemar_p", "lost", "gained")


def summary_differences(summary: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """What a run's summary says and its samples don't, a sentence each.

    Args:
        summary: rows of summary.jsonl, the full cache's first.
        rows: of samples.jsonl, each key once.
    """
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(str(row["label"]), []).append(row)
    baseline = {row["sample"]: row for row in by_label.get(summary[0]["label"], [])}
    told = [
        f"{len(by_label[label])} samples of {label}, of which the summary says nothing" for label in _unsaid(summary, by_label)
    ]
    for row in summary:
        mine = by_label.get(row["label"], [])
        if len(mine) != row["samples"]:
            told.append(f"the summary counts {row['samples']} samples of {row['label']}, and {len(mine)} are there")
        elif unpaired := [one["sample"] for one in mine if one["sample"] not in baseline]:
            told.append(f"sample {unpaired[0]} of {row['label']} has no record of the full cache")
        else:
            told += [f"{row['label']}: the summary says {what}" for what in _differences(row, mine, baseline)]
    return told


def _unsaid(summary: Sequence[Row], by_label: Mapping[str, Sequence[Row]]) -> list[str]:
    return sorted(by_label.keys() - {row["label"] for row in summary})


def _differences(said: Row, mine: Sequence[Row], baseline: Mapping[str, Row]) -> Iterator[str]:
    left_out = _COMBINED if "parts" in said else ()
    yield from _counted(said, mine, baseline, left_out)
    for name, part in said.get("parts", {}).items():
        risks = said["risks"][name]
        whole = {row["sample"]: row for row in part_rows(list(baseline.values()), name, risks)}
        for what in _counted(part, part_rows(mine, name, risks), whole, ()):
            yield f"{what} (part {name})"


def _counted(said: Row, mine: Sequence[Row], baseline: Mapping[str, Row], left_out: Sequence[str]) -> Iterator[str]:
    again = summarize(mine, baseline, tuple(said["rates"]), said["value"], said["lower_is_better"])
    for name, value in again.items():
        if name not in left_out and not _close(said.get(name), value):
            yield f"{name} = {said.get(name)}, its samples {value}"


def _close(one: Any, other: Any) -> bool:
    """Equal; numbers up to the order in which they are added."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_close(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(one) and math.isnan(other))
    return one == other
