"""Errors and intervals: against values computed by hand, and against what they promise, by simulation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import binomtest
from simulated import clustered, sizes_of

from mikv.metrics.statistics import interval, stderr


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1.0, 1.0, 1.0, 0.0], 0.25),  # mean 3/4, squares 3/16 + 9/16 = 3/4; 3/4 / 3 / 4 = 1/16
        ([1.0, 2.0, 3.0], 3**-0.5),  # squares 2; 2 / 2 / 3
        ([5.0, 5.0], 0.0),
    ],
)
def test_standard_error_by_hand(values: list[float], wanted: float) -> None:
    assert stderr(values) == pytest.approx(wanted)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_have_no_standard_error(values: list[float]) -> None:
    assert stderr(values) is None


def test_standard_error_of_clusters_by_hand() -> None:
    """Clusters a: 1, 1, 0 and b: 0, 0. Mean 2/5; residual sums 2 - 3 * 2/5 = 4/5 and -4/5; sqrt(2 * 16/25 * 2) / 5."""
    assert stderr([1, 1, 0, 0, 0], list("aaabb")) == pytest.approx((2 * 16 / 25 * 2) ** 0.5 / 5)
    assert stderr([1, 0, 1], ["a", "a", "a"]) is None


@pytest.mark.parametrize(("values", "outcomes"), [([0.1, 0.7, 0.4, 0.4], False), ([1, 0, 1, 1], True)])
def test_clusters_of_one_are_no_clusters(values: list[float], outcomes: bool) -> None:
    assert stderr(values, list("abcd")) == pytest.approx(stderr(values))
    assert interval(values, outcomes, list("abcd")) == pytest.approx(interval(values, outcomes))


@pytest.mark.parametrize("n", range(1, 60))
def test_bounds_lie_on_their_sides_of_the_rate(n: int) -> None:
    """Also where rounding says otherwise: a figure's error bars must not be negative."""
    for hits in (0, n // 3, n):
        values = [1.0] * hits + [0.0] * (n - hits)
        low, high = interval(values, True) or (0, 0)
        assert 0 <= low <= hits / n <= high <= 1


def test_intervals_by_hand() -> None:
    """Wilson's for 3 of 4; Student's for 1, 2, 3: t of 2 degrees of freedom is 4.302653."""
    assert interval([1, 1, 1, 0], True) == pytest.approx([0.300642, 0.954413], abs=1e-6)
    assert interval([1, 2, 3], False) == pytest.approx([2 - 4.302653 * 3**-0.5, 2 + 4.302653 * 3**-0.5])
    assert interval([0.5], False) is None
    assert interval([], True) is None


def test_zeros_are_outcomes_only_where_an_outcome_was_measured() -> None:
    """Eight samples in which nothing happened may be followed by one in which it does. Eight divergences of 0 say nothing."""
    assert interval([0.0] * 8, True) == pytest.approx([0.0, 0.324408], abs=1e-6)
    assert interval([0.0] * 8, False) is None
    assert interval([0.0, 1.0], False) != interval([0.0, 1.0], True)


def test_numbers_among_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.5 among outcomes"):
        interval([1.0, 0.5], True)


def test_an_interval_of_clustered_outcomes_stays_between_0_and_1() -> None:
    low, high = interval([1, 1, 1, 0], True, list("aabb")) or (0, 0)
    assert 0 <= low < 0.05
    assert 0.95 < high <= 1
    assert interval([1, 0, 1], True, list("aaa")) is None


def test_questions_on_one_passage_widen_the_interval() -> None:
    """Twelve passages with four questions each, all answered alike: as good as twelve questions, and no better."""
    values = [float(passage % 3 > 0) for passage in range(12) for _ in range(4)]
    apart, together = interval(values, True) or (0, 0), interval(values, True, [i // 4 for i in range(48)]) or (0, 0)
    assert together[1] - together[0] == pytest.approx(2 * (apart[1] - apart[0]), rel=0.15)


def test_all_right_in_few_clusters_is_not_certain() -> None:
    """Four clusters of ten: of a design effect nothing is seen, so it is 1 + 9 * 0.6; Student's quantile of three degrees of
    freedom: from n / (n + 3.182446 squared) with n = 40 / 6.4."""
    n = 40 / 6.4
    wanted = pytest.approx([n / (n + 3.182446**2), 1.0])
    assert interval([1.0] * 40, True, [i % 4 for i in range(40)]) == wanted


@pytest.mark.parametrize("size", [2, 5, 10])
@pytest.mark.parametrize("groups", [10, 50])
def test_one_wrong_answer_in_clusters_does_not_pass_for_a_proof_of_independence(size: int, groups: int) -> None:
    """A single one is alike no other; the interval must reach as far as without it."""
    clusters = [i // size for i in range(size * groups)]
    none, one = ([float(i >= wrong) for i in range(size * groups)] for wrong in (0, 1))
    assert interval(one, True, clusters)[0] <= interval(none, True, clusters)[0]  # type: ignore[index]


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 4), (17, 20), (48, 48)])
def test_outcomes_have_wilsons_interval(right: int, n: int) -> None:
    """Ours takes any n, scipy's whole ones."""
    wanted = binomtest(right, n).proportion_ci(method="wilson")
    assert interval([1.0] * right + [0.0] * (n - right), True) == pytest.approx([wanted.low, wanted.high])


def coverage(hits: int, trials: int) -> None:
    """95 % of the intervals must hold the truth; a binomial share of them will, within four of its standard errors."""
    assert 0.92 <= hits / trials <= 0.985, hits / trials


def test_intervals_of_rates_and_means_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = {"rate": 0, "mean": 0, "clustered": 0}
    for _ in range(1000):
        outcomes = (rng.random(40) < 0.3).astype(float).tolist()
        low, high = interval(outcomes, True) or (0, 0)
        hits["rate"] += low <= 0.3 <= high
        low, high = interval(rng.normal(2.0, 3.0, 12).tolist(), False) or (0, 0)
        hits["mean"] += low <= 2.0 <= high
        shared = np.repeat(rng.normal(0.0, 1.0, 25), 4) + rng.normal(0.0, 0.5, 100)
        low, high = interval(shared.tolist(), False, [i // 4 for i in range(100)]) or (0, 0)
        hits["clustered"] += low <= 0.0 <= high
    for found in hits.values():
        coverage(found, 1000)


@pytest.mark.parametrize(("n", "floor", "rare"), [(20, 0.84, 0.8), (32, 0.87, 0.8), (100, 0.9, 0.85), (300, 0.92, 0.9)])
def test_means_of_skewed_numbers_are_held_the_oftener_the_more_there_are(n: int, floor: float, rare: float) -> None:
    """Exponential, gamma and lognormal, as divergences are; changes of an F1 of which one in five is not 0, or (`rare`) one in
    20: there Student's is short, and a reader of few changes is told so."""
    rng = np.random.default_rng(0)
    size = (2000, n)
    falls = -rng.beta(0.8, 1.2, size)  # mean -0.4
    drawn = [
        (rng.exponential(1.0, size), 1.0, floor),
        (rng.gamma(0.5, 1.0, size), 0.5, floor),
        (rng.lognormal(0.0, 1.0, size), np.exp(0.5), floor),
        (falls * (rng.random(size) < 0.2), -0.08, floor),
        (falls * (rng.random(size) < 0.05), -0.02, rare),
    ]
    for trials, truth, least in drawn:
        bounds = [found for values in trials.tolist() if (found := interval(values, False))]
        assert least <= sum(low <= truth <= high for low, high in bounds) / len(bounds) <= 0.97


def test_intervals_that_ignore_clusters_are_far_too_short() -> None:
    """What the clustering is for: the same samples, taken for independent."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        shared = np.repeat(rng.normal(0.0, 1.0, 25), 4) + rng.normal(0.0, 0.5, 100)
        low, high = interval(shared.tolist(), False) or (0, 0)
        hits += low <= 0.0 <= high
    assert hits / 300 < 0.85


@pytest.mark.parametrize("correlation", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_intervals_of_outcomes_in_clusters_hold_the_truth(correlation: float, rate: float) -> None:
    """From 20 clusters on, of 2 to 10 samples; a design effect that is estimated from so few events alone would hold 0.75."""
    rng = np.random.default_rng(0)
    for kind in ("5", "mixed"):
        sizes = sizes_of(kind, 20)
        names = np.repeat(np.arange(20), sizes).tolist()
        hits = 0
        for happened in clustered(rng, 400, sizes, correlation, rate, 0.0)[0].tolist():
            values = [float(i < k) for k, size in zip(happened, sizes, strict=True) for i in range(size)]
            low, high = interval(values, True, names) or (0, 0)
            hits += low <= rate <= high
        assert hits / 400 >= 0.9


def test_the_slow_half_of_scipy_is_not_imported() -> None:
    """scipy.stats takes half a second, at the start of every command."""
    code = "import sys, mikv.metrics.combine; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}).returncode == 0
