"""How sure is a number? Standard errors, intervals, and the paired difference to the full twin.

Samples that share a context (the questions on one passage) are not independent; `clusters` names each sample's, and errors
are then those of the clusters' sums (the linearized "sandwich" estimate; with clusters of one it is the usual one).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm, t

_RESAMPLES = 10_000
_FEW = 100  # different values of a cluster, up to which a resample is drawn as counts of values
_CHUNK = 2**22  # elements of a bootstrap's index at a time
_LEVEL = 0.95


def stderr(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Standard error of the mean, from the samples' own spread; None below two samples or clusters (nothing is known)."""
    sums, sizes = _by_cluster(values, clusters)
    groups, n = len(sums), len(values)
    if groups < 2:
        return None
    residuals = sums - sizes * (sums.sum() / n)
    return float(math.sqrt((residuals**2).sum() * groups / (groups - 1)) / n)


def interval(values: Sequence[float], outcomes: bool = True, clusters: Sequence[Hashable] | None = None) -> list[float] | None:
    """95 % interval of the mean: Wilson's for outcomes that are right or wrong, else Student's t; None where nothing is known.

    outcomes: values that are all 0 or 1 are outcomes (a divergence of 0 is none).
    """
    if not values:
        return None
    mean, groups = math.fsum(values) / len(values), len(values) if clusters is None else len(set(clusters))
    error = stderr(values, clusters)
    if outcomes and _binary(values):
        if clusters is None:
            return _wilson(mean, len(values), float(norm.ppf((1 + _LEVEL) / 2)))
        if error is None:
            return None
        # Wilson's, of as many independent samples as would have this error (Korn and Graubard 1998). All right or all
        # wrong says nothing about how alike the samples of a cluster are: each cluster then counts once.
        effective = groups if mean in (0.0, 1.0) else len(values) if error == 0 else mean * (1 - mean) / error**2
        return _wilson(mean, min(effective, len(values)), float(t.ppf((1 + _LEVEL) / 2, groups - 1)))
    if error is None:
        return None
    half = float(t.ppf((1 + _LEVEL) / 2, groups - 1)) * error
    return [mean - half, mean + half]


@dataclass(frozen=True)
class Paired:
    """The change from the full twin to a policy on the same samples.

    difference: mean of policy - twin; stderr; ci95: percentile bootstrap; p: McNemar's exact test (two-sided), None where
    values are no outcomes or samples share clusters (it counts each as independent); lower, higher: samples whose value
    fell, rose; n: samples.
    """

    difference: float
    stderr: float | None
    ci95: list[float] | None
    p: float | None
    lower: int
    higher: int
    n: int


def paired(
    mine: Sequence[float], twin: Sequence[float], seed: int = 0, clusters: Sequence[Hashable] | None = None
) -> Paired | None:
    """Compare sample by sample; None where there are none. The bootstrap resamples samples, or whole clusters.

    Outcomes that all changed alike (mostly: none changed) leave nothing to resample, but are not certain: the interval then
    is the score interval of a paired difference (Tango 1998), which without a changed pair is -+ z2 / (n + z2).

    Raises:
        ValueError: the two have different lengths.
    """
    if len(mine) != len(twin):
        raise ValueError(f"{len(mine)} values have no pairs among {len(twin)}")
    if not mine:
        return None
    change = np.asarray(mine, float) - np.asarray(twin, float)
    lower, higher = int((change < 0).sum()), int((change > 0).sum())
    difference, changes, outcomes = float(change.mean()), change.tolist(), _binary(mine) and _binary(twin)
    p = None
    if outcomes and clusters is None:
        p = float(binomtest(min(lower, higher), lower + higher).pvalue) if lower + higher else 1.0
    ci95 = _bootstrap(changes, seed, clusters)
    if outcomes and len(set(changes)) == 1:
        ci95 = _unchanging(difference, len(change) if clusters is None else len(set(clusters)))
    return Paired(difference, stderr(changes, clusters), ci95, p, lower, higher, len(change))


def _bootstrap(values: Sequence[float], seed: int, clusters: Sequence[Hashable] | None) -> list[float] | None:
    """Percentile interval of the mean; None below two samples or clusters."""
    sums, sizes = _by_cluster(values, clusters)
    groups = len(sums)
    if groups < 2:
        return None
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    if len(counts) <= _FEW:  # outcomes change by -1, 0 or 1: how often each is drawn is all that matters
        drawn = rng.multinomial(groups, counts / groups, size=_RESAMPLES)
        return _quantiles(drawn @ kinds[0] / (drawn @ kinds[1]))
    means = []
    step = max(1, _CHUNK // groups)
    for start in range(0, _RESAMPLES, step):
        index = rng.integers(groups, size=(min(step, _RESAMPLES - start), groups))
        means.append(sums[index].sum(axis=1) / sizes[index].sum(axis=1))
    return _quantiles(np.concatenate(means))


def _quantiles(means: np.ndarray) -> list[float]:
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return [float(low), float(high)]


def _wilson(p: float, n: float, z: float) -> list[float]:
    """Wilson's score interval; n need not be whole (scipy's must be)."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # 0 of n reaches down to 0 exactly, which rounding may miss: a bound never lies on the wrong side of the rate
    return [min(p, max(0.0, (centre - half) / scale)), max(p, min(1.0, (centre + half) / scale))]


def _unchanging(difference: float, n: int) -> list[float]:
    """Tango's interval where all n pairs of outcomes changed by the same -1, 0 or 1."""
    z2 = float(norm.ppf((1 + _LEVEL) / 2)) ** 2
    reach = z2 / (n + z2) * (1 if difference == 0 else 2)
    return [max(-1.0, difference - reach), min(1.0, difference + reach)]


def _by_cluster(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each cluster, float64 [clusters]."""
    array = np.asarray(values, float)
    if clusters is None:
        return array, np.ones(len(array))
    places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([places[name] for name in clusters], dtype=int)
    return np.bincount(index, array, len(places)), np.bincount(index, minlength=len(places)).astype(float)


def _binary(values: Sequence[float]) -> bool:
    return set(values) <= {0.0, 1.0}
