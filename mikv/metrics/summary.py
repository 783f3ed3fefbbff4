"""One row per policy: score with its uncertainty, difference to the full twin, fidelity, bytes counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mikv.metrics.statistics import interval, paired, stderr

Row = dict[str, Any]

FIDELITY = ("kl", "agreement", "nll_change")


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
        "rates": {flag: fmean(float(row[flag]) for row in samples) for flag in flags},
    }
    if all(name in row for name in FIDELITY for row in samples):
        summary |= {name: fmean(row[name] for row in samples) for name in FIDELITY}
    if full is not None and is_mean:
        change = paired(scores, [float(full[row["sample"]]["score"]) for row in scored])
        assert change is not None
        lost, gained = (change.higher, change.lower) if lower_is_better else (change.lower, change.higher)
        summary |= {
            "difference": change.difference,
            "difference_stderr": change.stderr,
            "difference_ci95": change.ci95,
            "mcnemar_p": change.p,
            "lost": lost,
            "gained": gained,
        }
    return summary
