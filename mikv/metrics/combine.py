"""Several rates as one: the mean of a suite's risks, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from mikv.metrics.statistics import PRIOR_CLUSTERS, PRIOR_CORRELATION
from mikv.metrics.summary import cluster_of

Row = dict[str, Any]


def combine(
    rows: Mapping[str, Sequence[Row]],
    full: Mapping[str, Mapping[str, Row]] | None,
    parts: Mapping[str, Row],
    risks: Mapping[str, Sequence[str]],
) -> Row:
    """The mean of a suite's risks: of each part the rates that `risks` names, each with equal weight.

    The interval is recovered from the rates' own (MOVER; Zou and Donner 2008, doi:10.1002/sim.3095), so that parts in which
    nothing happened keep the width of theirs. Rates of the same samples, or of samples of several parts that share a context
    (Tensor Trust's defences stand in all of its parts), are correlated, as their clusters' sums show.

    Args:
        rows: the samples of each part, by its name.
        full: the full cache's rows of each part by `sample`.
        parts: the summary of each part.
        risks: the flags of each part that are risks.
    """
    named = [(part, risk) for part, names in risks.items() for risk in names if risk in parts[part]["rates"]]
    if not named:
        return {}
    rates = [parts[part]["rates"][risk] for part, risk in named]
    possible = [[row for row in rows[part] if row.get(risk) is not None] for part, risk in named]
    mine = [[float(row[risk]) for row in of_it] for (_, risk), of_it in zip(named, possible, strict=True)]
    combined = _mean(rates, possible, mine, "value", "stderr", "ci95")
    if all("difference" in rate for rate in rates):
        assert full is not None
        changes = [
            [value - float(full[part][row["sample"]][risk]) for value, row in zip(values, of_it, strict=True)]
            for (part, risk), of_it, values in zip(named, possible, mine, strict=True)
        ]
        combined |= _mean(rates, possible, changes, "difference", "difference_stderr", "difference_ci95")
        combined |= {"mcnemar_p": None, **{name: sum(rate[name] for rate in rates) for name in ("lost", "gained")}}
    return combined


def _mean(
    rates: Sequence[Row], rows: Sequence[Sequence[Row]], values: Sequence[Sequence[float]], name: str, error: str, bounds: str
) -> Row:
    """The mean of the rates' `name` with its error and interval, from theirs. rows, values: of the samples of each rate."""
    mean = fmean(rate[name] for rate in rates)
    together: Row = {name: mean, error: None, bounds: None}
    shared = _correlations(rows, values)
    if all(rate[error] is not None for rate in rates):
        together[error] = _length([rate[error] for rate in rates], shared)
    if all(rate[bounds] is not None for rate in rates):
        below = _length([rate[name] - rate[bounds][0] for rate in rates], shared)
        above = _length([rate[bounds][1] - rate[name] for rate in rates], shared)
        together[bounds] = [mean - below, mean + above]
    return together


def _length(errors: Sequence[float], shared: np.ndarray) -> float:
    """Error of the mean of numbers with these errors and correlations."""
    return math.sqrt(max(0.0, np.array(errors) @ shared @ np.array(errors))) / len(errors)


def _correlations(rows: Sequence[Sequence[Row]], values: Sequence[Sequence[float]]) -> np.ndarray:
    """Of means of these values, [means, means]: from the residuals of the contexts that they share.

    As in `design_effect`, a few events say little: two contexts' worth that correlate by 0.6 are added. Else parts in which
    nothing happened would pass for independent, and two opposite events in one context for a proof that the mean can't change.
    """
    places = {name: i for i, name in enumerate(dict.fromkeys(cluster_of(row) for some in rows for row in some))}
    residuals, sizes = np.zeros((2, len(rows), len(places)))
    for i, (some, of_it) in enumerate(zip(rows, values, strict=True)):
        index = [places[cluster_of(row)] for row in some]
        np.add.at(residuals[i], index, np.array(of_it) - fmean(of_it))
        np.add.at(sizes[i], index, 1)
    overlap = _scaled(sizes @ sizes.T)  # the correlation of means whose samples are all alike in each context
    alike = (sizes**2).sum(axis=1) / sizes.sum(axis=1)
    prior = np.sqrt(PRIOR_CLUSTERS * alike * (1 + (alike - 1) * PRIOR_CORRELATION))
    assumed = np.outer(prior, prior) * np.where(np.eye(len(rows)) > 0, 1, PRIOR_CORRELATION * overlap)
    return _scaled(residuals @ residuals.T + assumed)


def _scaled(products: np.ndarray) -> np.ndarray:
    """Correlations from covariances."""
    sizes = np.sqrt(np.diag(products))
    return products / np.outer(sizes, sizes)
