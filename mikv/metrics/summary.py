"""One row per policy: score with its uncertainty, difference to the full twin, bytes counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

Row = dict[str, Any]


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean, from the sample's own spread; None below two values (nothing is known)."""
    n = len(values)
    if n < 2:
        return None
    mean = fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def summarize(samples: Sequence[Row], full: Mapping[int, Row] | None, flags: Sequence[str]) -> Row:
    """Summary of one policy's samples.

    Args:
        samples: rows of samples.jsonl of one policy.
        full: the full twin's rows by doc_id, for the paired difference.
        flags: outcome flags whose rates are reported.
    """
    correct = [float(row["correct"]) for row in samples]
    n = len(samples)
    interval = binomtest(int(sum(correct)), n).proportion_ci(method="wilson")
    nbytes: Counter[str] = Counter()
    for row in samples:
        nbytes.update(row["nbytes"])
    stored, whole = sum(nbytes.values()), sum(row["full_nbytes"] for row in samples)
    summary: Row = {
        "value": fmean(correct),
        "n": n,
        "stderr": stderr(correct),
        "ci95": [interval.low, interval.high],
        "size_percent": 100 * stored / whole,
        "nbytes": {part: size / n for part, size in sorted(nbytes.items())},
        "full_nbytes": whole / n,
        "kept_percent": 100 * sum(r["kept_tokens"] for r in samples) / sum(r["seen_tokens"] for r in samples),
        "exercised": sum(row["compressed_tokens"] > 0 for row in samples),
        "ended": sum(row["ended"] for row in samples),
        # shared by all policies of the panel: the price of the whole curve, not of this point
        "seconds": {phase: sum(row["seconds"][phase] for row in samples) for phase in samples[0]["seconds"]},
        "rates": {flag: fmean(float(row[flag]) for row in samples) for flag in flags},
    }
    if full is not None:
        pairs = [(float(full[row["doc_id"]]["correct"]), float(row["correct"])) for row in samples]
        change = [mine - twin for twin, mine in pairs]
        summary |= {
            "difference": fmean(change),
            "difference_stderr": stderr(change),
            "lost": sum(c < 0 for c in change),
            "gained": sum(c > 0 for c in change),
        }
    return summary
