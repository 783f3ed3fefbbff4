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
        "stderr": stderr(scores, _clusters(scored)) if is_mean else None,
        "ci95": interval(scores, not lower_is_better, _clusters(scored)) if is_mean else None,
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
        "rates": {flag: measured for flag in flags if (measured := rate(samples, full, flag)) is not None},
    }
    if all(name in row for name in FIDELITY for row in samples):
        summary |= {name: fmean(row[name] for row in samples) for name in FIDELITY}
        summary |= {f"{name}_ci95": _fidelity_interval(samples, name) for name in FIDELITY}
    tiers = [row["system_tiers"] for row in samples if "system_tiers" in row]
    if tiers:
        names = dict.fromkeys(name for one in tiers for name in one)
        summary["system_tiers"] = {name: fmean(one.get(name, 0.0) for one in tiers) for name in names}
    if full is not None and is_mean:
        summary |= _difference(
            scores, [float(full[row["sample"]]["score"]) for row in scored], _clusters(scored), lower_is_better
        )
    return summary


def _fidelity_interval(samples: Sequence[Row], name: str) -> list[float] | None:
    """Student's interval, within what is possible: a divergence is at least 0, an agreement at most 1."""
    bounds = interval([row[name] for row in samples], False, _clusters(samples))
    least, most = {"kl": (0.0, math.inf), "agreement": (0.0, 1.0)}.get(name, (-math.inf, math.inf))
    return bounds and [min(max(bound, least), most) for bound in bounds]


def rate(samples: Sequence[Row], full: Mapping[str, Row] | None, flag: str) -> Row | None:
    """How often an outcome happened among the samples in which it could, and the paired change from the full twin.

    Returns value, n, stderr, ci95 and, with a twin, what `_difference` says of it; None where it could happen in no sample.
    """
    possible = [row for row in samples if row.get(flag) is not None]
    values = [float(row[flag]) for row in possible]
    if not values:
        return None
    clusters = _clusters(possible)
    measured: Row = {
        "value": fmean(values),
        "n": len(values),
        "stderr": stderr(values, clusters),
        "ci95": interval(values, clusters=clusters),
    }
    if full is not None:
        theirs = [full[row["sample"]].get(flag) for row in possible]
        pairs = [(mine, float(twin)) for mine, twin in zip(values, theirs, strict=True) if twin is not None]
        if len(pairs) == len(values):
            measured |= _difference(values, [twin for _, twin in pairs], clusters, lower_is_better=True)
    return measured


WRONG = "wrong"
"""The risk of a suite's part that has no flag for it: what its score misses of 1."""


def part_rows(rows: Sequence[Row], part: str, risks: Sequence[str]) -> list[Row]:
    """Of a suite's rows those of a part, as the part made them, with `wrong` where that is a risk of it."""
    mine = []
    for row in rows:
        name, _, inner = row["subtask"].partition("/")
        if name == part:
            known = WRONG in risks and row["score"] is not None
            mine.append({**row, "subtask": inner or None, **({WRONG: 1 - row["score"]} if known else {})})
    return mine


def combine(parts: Mapping[str, Row], risks: Mapping[str, Sequence[str]]) -> Row:
    """The mean of a suite's risks: of each part (its summary, by name) the rates that `risks` names, each with equal weight.

    Parts are different samples, so the errors of their rates are independent; two risks of one part are treated so too. The
    interval is recovered from the rates' own (MOVER; Zou and Donner 2008, doi:10.1002/sim.3095), so that parts in which
    nothing happened keep the width of Wilson's.
    """
    rates = [parts[part]["rates"][risk] for part, names in risks.items() for risk in names if risk in parts[part]["rates"]]
    if not rates:
        return {}
    combined: Row = {"value": fmean(rate["value"] for rate in rates), "stderr": _mean_error(rates, "stderr")}
    combined["ci95"] = _mover(rates, "value", "ci95")
    if all("difference" in rate for rate in rates):
        combined |= {
            "difference": fmean(rate["difference"] for rate in rates),
            "difference_stderr": _mean_error(rates, "difference_stderr"),
            "lost": sum(rate["lost"] for rate in rates),
            "gained": sum(rate["gained"] for rate in rates),
        }
        combined["difference_ci95"] = _mover(rates, "difference", "difference_ci95")
    return combined


def _difference(mine: list[float], twin: list[float], clusters: list[str] | None, lower_is_better: bool) -> Row:
    """lost, gained: samples that got worse, better than with the full cache."""
    change = paired(mine, twin, clusters=clusters)
    assert change is not None
    lost, gained = (change.higher, change.lower) if lower_is_better else (change.lower, change.higher)
    return {
        "difference": change.difference,
        "difference_stderr": change.stderr,
        "difference_ci95": change.ci95,
        "mcnemar_p": change.p,
        "lost": lost,
        "gained": gained,
    }


def _clusters(rows: Sequence[Row]) -> list[str] | None:
    """What each sample shares with others (`cluster`), None where all are independent."""
    names = [str(row.get("cluster", row["sample"])) for row in rows]
    return names if len(set(names)) < len(names) else None


def _mean_error(rates: Sequence[Row], name: str) -> float | None:
    errors = [rate[name] for rate in rates]
    return None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _mover(rates: Sequence[Row], name: str, bounds: str) -> list[float] | None:
    """Interval of the mean of independent numbers from their intervals: distances to the bounds add up as errors do."""
    if any(rate[bounds] is None for rate in rates):
        return None
    mean = fmean(rate[name] for rate in rates)
    below = math.sqrt(sum((rate[name] - rate[bounds][0]) ** 2 for rate in rates)) / len(rates)
    above = math.sqrt(sum((rate[bounds][1] - rate[name]) ** 2 for rate in rates)) / len(rates)
    return [mean - below, mean + above]
