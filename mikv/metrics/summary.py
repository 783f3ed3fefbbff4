"""One row per policy: score with its uncertainty, difference to the full cache, fidelity, bytes counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from mikv.metrics.paired import paired
from mikv.metrics.statistics import interval, stderr

Row = dict[str, Any]

Kind = Literal["outcome", "number", "divergence"]
"""What a sample's score is. outcome: 1 or 0, something happened or did not. number: any number (an F1, a share). divergence:
how far a policy is from the full cache, whose own is 0 by definition."""

FIDELITY = {"kl": (0.0, math.inf), "agreement": (0.0, 1.0), "nll_change": (-math.inf, math.inf)}
"""Between which values each measure of it can lie."""


def summarize(
    samples: Sequence[Row],
    full: Mapping[str, Row] | None,
    flags: Sequence[str],
    value: float,
    kind: Kind,
    lower_is_better: bool = False,
) -> Row:
    """Summary of one policy's samples.

    Of the score, and of each rate in `rates`:

        value                  the metric; a rate: the share of the samples in which its outcome could happen
        stderr                 its standard error, from the samples' spread, clustered where samples share a context
        ci95                   its 95 % interval: Wilson's score interval of outcomes, Student's of numbers
        difference             paired change from the full cache, in the unit of the value
        difference_stderr      its standard error, as above
        difference_ci95        its 95 % interval: Tango's score interval of outcomes, Student's of numbers
        mcnemar_p              exact test of outcomes: McNemar's, in clusters the one that flips whole clusters; None of numbers
        lost, gained           samples that got worse, better than with the full cache

    An interval is None where nothing is known: of fewer than two samples or clusters, or of numbers that are all alike. A
    divergence is a difference to the full cache itself: it has no further difference, test, lost or gained.

    Args:
        samples: rows of samples.jsonl of one policy. Those with a `score` decide the metric; those with the same `cluster`
            share a context.
        full: the full cache's rows by `sample`, for the paired difference.
        flags: outcomes whose rates are reported; a flag that is a number, not a bool, is the share of something.
        value: the metric. Where it is not the mean of the scores (a perplexity), it has no interval here.
        kind: of the scores.
        lower_is_better: for `lost` and `gained`.
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
        "kind": kind,
        "n": len(scores) or n,
        "samples": n,
        "stderr": stderr(scores, clusters_of(scored)) if is_mean else None,
        "ci95": interval(scores, kind == "outcome", clusters_of(scored)) if is_mean else None,
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
        for name, possible in FIDELITY.items():
            bounds = interval([row[name] for row in samples], False, clusters_of(samples))
            summary[f"{name}_ci95"] = _within(bounds, *possible)
    tiers = [row["system_tiers"] for row in samples if "system_tiers" in row]
    if tiers:
        names = dict.fromkeys(name for one in tiers for name in one)
        summary["system_tiers"] = {name: fmean(one.get(name, 0.0) for one in tiers) for name in names}
    if kind == "divergence":
        summary["ci95"] = _within(summary["ci95"], 0.0, math.inf)
    elif full is not None and is_mean:
        theirs = [float(full[row["sample"]]["score"]) for row in scored]
        summary |= _difference(scores, theirs, kind == "outcome", clusters_of(scored), lower_is_better)
    return summary


NAMES = ("policy", "label", "model", "task", "question")
"""Of which policy and question a summary is: the same in all of its samples."""


def circumstances(samples: Sequence[Row]) -> Row:
    """How a policy's samples were computed: each value once, as a resumed run may have several; memory; the paper's size."""
    return {
        "size_percent_paper": samples[0]["size_percent_paper"],
        **{name: sorted({row[name] for row in samples}) for name in ("reader", "attention", "environment")},
        "batch_size": sorted({row["batch"][0] for row in samples}),
        "allocated_nbytes": fmean(row["allocated_nbytes"] for row in samples),
        "peak_nbytes": max((row["peak_nbytes"] for row in samples if row["peak_nbytes"] is not None), default=None),
        **_worst_layer([row for row in samples if row.get("worst_layer") is not None]),
    }


def _worst_layer(samples: Sequence[Row]) -> Row:
    """The layer that was the worst most often, and how far the worst one's attention was moved on average (see
    mikv.cache.distance); nothing of records that don't say it."""
    if not samples:
        return {}
    layer = Counter(row["worst_layer"] for row in samples).most_common(1)[0][0]
    return {"worst_layer": layer, "layer_distance": fmean(row["layer_distance"] for row in samples)}


def clusters_of(rows: Sequence[Row]) -> list[str] | None:
    """What each sample shares with others (`cluster`), None where all are independent."""
    names = [cluster_of(row) for row in rows]
    return names if len(set(names)) < len(names) else None


def cluster_of(row: Row) -> str:
    """The context that a sample may share with others; without one it is the sample itself."""
    return str(row.get("cluster", row["sample"]))


def _within(bounds: list[float] | None, least: float, most: float) -> list[float] | None:
    """Student's interval knows nothing of what is possible."""
    return bounds and [min(max(bound, least), most) for bound in bounds]


def rate(samples: Sequence[Row], full: Mapping[str, Row] | None, flag: str) -> Row | None:
    """How often an outcome happened among the samples in which it could, and the paired change from the full cache; None where
    it could happen in no sample. Fields: see `summarize`."""
    possible = [row for row in samples if row.get(flag) is not None]
    if not possible:
        return None
    values, clusters = [float(row[flag]) for row in possible], clusters_of(possible)
    outcomes = all(isinstance(row[flag], bool) for row in possible)
    measured: Row = {
        "value": fmean(values),
        "n": len(values),
        "stderr": stderr(values, clusters),
        "ci95": interval(values, outcomes, clusters),
    }
    theirs = _theirs(possible, full, flag)
    if theirs is not None:
        measured |= _difference(values, theirs, outcomes, clusters, lower_is_better=True)
    return measured


WRONG = "wrong"
"""The risk of a suite's part that has no flag for it: what its score misses of 1."""


def part_rows(rows: Sequence[Row], part: str, risks: Sequence[str], kind: Kind) -> list[Row]:
    """Of a suite's rows those of a part, as the part made them, with `wrong` where that is a risk of it: yes or no where its
    score is an outcome."""
    mine: list[Row] = []
    for row in rows:
        name, _, inner = row["subtask"].partition("/")
        if name == part:
            mine.append({**row, "subtask": inner or None})
            if WRONG in risks and row["score"] is not None:
                mine[-1][WRONG] = row["score"] == 0 if kind == "outcome" else 1 - row["score"]
    return mine


def _theirs(rows: Sequence[Row], full: Mapping[str, Row] | None, flag: str) -> list[float] | None:
    """The full cache's values of a flag on these samples; None where it has not all of them."""
    values = [] if full is None else [full[row["sample"]].get(flag) for row in rows]
    known = [float(value) for value in values if value is not None]
    return known if known and len(known) == len(values) else None


def _difference(
    mine: list[float], theirs: list[float], outcomes: bool, clusters: list[str] | None, lower_is_better: bool
) -> Row:
    change = paired(mine, theirs, outcomes, clusters)
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
