"""One row per policy: score with its uncertainty, difference to the full twin, fidelity, bytes counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

Row = dict[str, Any]

FIDELITY = ("kl", "agreement", "nll_change")


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean, from the sample's own spread; None below two values (nothing is known)."""
    n = len(values)
    if n < 2:
        return None
    mean = fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def interval(values: Sequence[float], outcomes: bool = True) -> list[float] | None:
    """95 % interval of the mean: Wilson's for outcomes that are right or wrong, else the normal one.

    outcomes: values that are all 0 or 1 are outcomes (a divergence of 0 is none).
    """
    if not values:
        return None
    if outcomes and set(values) <= {0.0, 1.0}:
        wilson = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
        return [float(wilson.low), float(wilson.high)]
    error = stderr(values)
    return None if error is None else [fmean(values) - 1.96 * error, fmean(values) + 1.96 * error]


def summarize(
    samples: Sequence[Row],
    full: Mapping[str, Row] | None,
    flags: Sequence[str],
    value: float,
    lower_is_better: bool = False,
) -> Row:
    """Summary of one policy's samples.

    Args:
        samples: rows of samples.jsonl of one policy. Those with a `score` decide the metric.
        full: the full twin's rows by `sample`, for the paired difference.
        flags: outcome flags whose rates are reported.
        lower_is_better: than the twin; for `lost` and `gained`.
        value: the metric. Where it is not the mean of the scores (a perplexity), it has no interval here.
    """
    scored = [row for row in samples if row["score"] is not None]
    scores = [float(row["score"]) for row in scored]
    is_mean = bool(scores) and math.isclose(value, fmean(scores), abs_tol=1e-9)
    n = len(samples)
    nbytes: Counter[str] = Counter()
    for row in samples:
        nbytes.update(row["nbytes"])
    stored, whole = sum(nbytes.values()), sum(row["full_nbytes"] for row in samples)
    summary: Row = {
        "value": value,
        "n": len(scores) or n,
        "samples": n,
        "stderr": stderr(scores) if is_mean else None,
        "ci95": interval(scores, not lower_is_better) if is_mean else None,
        "size_percent": 100 * stored / whole,
        "nbytes": {part: size / n for part, size in sorted(nbytes.items())},
        "full_nbytes": whole / n,
        "kept_percent": 100 * sum(r["kept_tokens"] for r in samples) / sum(r["seen_tokens"] for r in samples),
        "exercised": sum(row["compressed_tokens"] > 0 for row in samples),
        "cut": sum(row["cut_tokens"] > 0 for row in samples),
        "cut_tokens": sum(row["cut_tokens"] for row in samples),
        # answers that ran into the limit of new tokens; None where nothing is generated
        "unended": sum(not row["ended"] for row in samples) if all("ended" in row for row in samples) else None,
        # shared by all policies of the panel: the price of the whole curve, not of this point
        "seconds": {phase: sum(row["seconds"][phase] for row in samples) for phase in samples[0]["seconds"]},
        "rates": {flag: fmean(float(row[flag]) for row in samples if row.get(flag) is not None) for flag in flags},
    }
    if all(name in row for name in FIDELITY for row in samples):
        summary |= {name: fmean(row[name] for row in samples) for name in FIDELITY}
    if full is not None and is_mean:
        change = [float(row["score"]) - float(full[row["sample"]]["score"]) for row in scored]
        summary |= {
            "difference": fmean(change),
            "difference_stderr": stderr(change),
            "lost": sum(c > 0 if lower_is_better else c < 0 for c in change),
            "gained": sum(c < 0 if lower_is_better else c > 0 for c in change),
        }
    return summary
