"""A run's folder written by hand, for what reads records: the report, the tracker, the notebooks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mikv.metrics.summary import NAMES, circumstances, summarize
from mikv.records import RunFolder

Row = dict[str, Any]

# Policy and label -> answers to eight questions whose targets are 0..7; the full cache gets the last one wrong.
ANSWERS: dict[tuple[str, str], Sequence[str]] = {
    ("full", "full"): "01234569",
    ("h2o", "h2o 20%"): "09999997",
    ("mikv", "mikv 20% 8/3"): "01234579",
}
BYTES = {"full": {"raw": 1000}, "h2o": {"raw": 180, "positions": 20}, "mikv": {"codes": 200, "raw": 100, "scale": 30}}


def samples(answers: Mapping[tuple[str, str], Sequence[str]] = ANSWERS) -> list[Row]:
    """Rows of samples.jsonl."""
    return [
        {
            "key": f"{label}/{i}",
            "policy": policy,
            "label": label,
            "model": "tiny",
            "task": "digits",
            "question": "visible",
            "sample": str(i),
            "cut_tokens": 0,
            "compressed_tokens": 0 if policy == "full" else 9,
            "kept_tokens": 10,
            "seen_tokens": 10,
            "nbytes": BYTES[policy],
            "full_nbytes": 1000,
            "size_percent_paper": 20.0,
            "allocated_nbytes": 1100,
            "peak_nbytes": 10**9,
            "reader": "working",
            "attention": "torch",
            "batch": [4, 3],
            "answer": answer,
            "target": str(i),
            "score": float(answer == str(i)),
            "correct": answer == str(i),
            "invented": answer == "9",
            "ended": True,
            "kl": 0.0 if policy == "full" else 0.1 + i / 10,
            "agreement": 1.0 if policy == "full" else 0.9,
            "nll_change": 0.0,
            "seconds": {"prefill": 0.5, "decode": 0.25},
        }
        for (policy, label), given in answers.items()
        for i, answer in enumerate(given)
    ]


def divergences() -> list[Row]:
    """The same rows of a task whose score is the divergence, such as fidelity."""
    rows = [row | {"task": "texts", "score": row["kl"]} for row in samples()]
    return [{name: value for name, value in row.items() if name != "correct"} for row in rows]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows of summary.jsonl, as a run makes them: of divergences where the score is one."""
    metric, kind, lower = ("kl", "divergence", True) if rows[0]["task"] == "texts" else ("accuracy", "outcome", False)
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    full = {row["sample"]: row for row in rows if row["policy"] == "full"}
    made = []
    for mine in by_label.values():
        value = sum(row["score"] for row in mine) / len(mine)
        made.append(
            {name: mine[0][name] for name in NAMES}
            | {"metric": metric, "lower_is_better": lower}
            | summarize(mine, full, ("invented",), value, kind, lower)
            | {"scores": {metric: value}, "by_task": {}}
            | circumstances([{"environment": "unknown"} | row for row in mine])
        )
    return made


def write_run(path: Path, rows: Sequence[Row] | None = None) -> Path:
    """The folder of a run that has ended."""
    rows = samples() if rows is None else rows
    with RunFolder(path, {"model": {"name": "tiny", "weights": "random", "dtype": "float32"}}, "seed: 0\n") as run:
        run.write_summary(summary(run.append(rows)))
    return path


def read_summary(path: Path) -> list[Row]:
    return [json.loads(line) for line in (path / "summary.jsonl").read_text(encoding="utf-8").splitlines()]
