"""Does a summary say what its samples do? Counted again, field by field: a score that was edited by hand, a line that went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from mikv.metrics.combine import combine
from mikv.metrics.summary import NAMES, circumstances, part_rows, summarize

Row = dict[str, Any]


_NOT_COUNTED = {*NAMES, "metric", "lower_is_better", "scores", "by_task", "parts", "risks"}
"""Fields of a summary that are not counted from samples alone, or elsewhere."""


_ADDED = {"relative": 1e-6, "absolute": 1e-9}
"""How far the order in which numbers are added moves their sum."""


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
    again = summarize(mine, baseline, tuple(said["rates"]), said["value"], said["kind"], said["lower_is_better"])
    again |= circumstances(mine)
    for name in NAMES:
        if any(row[name] != said[name] for row in mine):
            yield f"{name} = {said[name]}, its samples {', '.join(sorted({str(row[name]) for row in mine}))}"
    if said["metric"] in said["scores"]:
        again["scores"] = {**said["scores"], said["metric"]: said["value"]}
    if "parts" in said:
        own, full = (_by_part(said, rows) for rows in (mine, list(baseline.values())))
        whole = {name: {row["sample"]: row for row in rows} for name, rows in full.items()}
        for name, part in said["parts"].items():
            flags, value = tuple(part["rates"]), part["value"]
            counted = summarize(own[name], whole[name], flags, value, part["kind"], part["lower_is_better"])
            yield from (f"{what} (part {name})" for what in _unlike(part, counted, _scores(own[name])))
        again |= combine(own, whole, said["parts"], said["risks"])
    yield from _unlike(said, again, _scores(mine))


def _by_part(said: Row, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Of a suite's rows those of each part."""
    return {name: part_rows(rows, name, said["risks"][name], part["kind"]) for name, part in said["parts"].items()}


def _unlike(said: Row, again: Row, scores: Sequence[float]) -> Iterator[str]:
    if said["stderr"] is not None and again["stderr"] is None:  # so the value was their mean (see `summarize`)
        yield f"value = {said['value']}, its samples {fmean(scores) if scores else None}"
        return
    for name, value in again.items():
        if name not in said or not alike(said[name], value, **_ADDED):
            yield f"{name} = {said.get(name)}, its samples {value}"
    for name in said.keys() - again.keys() - _NOT_COUNTED:
        yield f"{name} = {said[name]}, its samples nothing"


def _scores(rows: Sequence[Row]) -> list[float]:
    return [float(row["score"]) for row in rows if row["score"] is not None]


def alike(one: Any, other: Any, relative: float, absolute: float) -> bool:
    """Whether two JSON values are equal; two floats, up to that difference. NaN is NaN."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(one[name], other[name], relative, absolute) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(alike(*pair, relative, absolute) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=relative, abs_tol=absolute) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)
