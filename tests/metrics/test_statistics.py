"""Errors and intervals: against values computed by hand, and against what they promise, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from mikv.metrics import statistics
from mikv.metrics.statistics import interval, paired, stderr


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


def test_clusters_of_one_are_no_clusters() -> None:
    values = [0.1, 0.7, 0.4, 0.4]
    assert stderr(values, list("abcd")) == pytest.approx(stderr(values))
    assert interval(values, clusters=list("abcd")) == pytest.approx(interval(values))
    assert paired(values, [0.0] * 4, clusters=list("abcd")) == paired(values, [0.0] * 4)


@pytest.mark.parametrize("n", range(1, 60))
def test_bounds_lie_on_their_sides_of_the_rate(n: int) -> None:
    """Also where rounding says otherwise: a figure's error bars must not be negative."""
    for hits in (0, n // 3, n):
        values = [1.0] * hits + [0.0] * (n - hits)
        low, high = interval(values) or (0, 0)
        assert 0 <= low <= hits / n <= high <= 1


def test_intervals_by_hand() -> None:
    """Wilson's for 3 of 4; Student's for 1, 2, 3: t of 2 degrees of freedom is 4.302653."""
    assert interval([1, 1, 1, 0]) == pytest.approx([0.300642, 0.954413], abs=1e-6)
    assert interval([1, 2, 3]) == pytest.approx([2 - 4.302653 * 3**-0.5, 2 + 4.302653 * 3**-0.5])
    assert interval([0.5]) is None
    assert interval([]) is None
    assert interval([0, 0, 0], outcomes=False) == [0, 0]


def test_an_interval_of_clustered_outcomes_stays_between_0_and_1() -> None:
    low, high = interval([1, 1, 1, 0], clusters=list("aabb")) or (0, 0)
    assert 0 <= low < 0.05
    assert 0.95 < high <= 1


def test_questions_on_one_passage_widen_the_interval() -> None:
    """Twelve passages with four questions each, all answered alike: as good as twelve questions, and no better."""
    values = [float(passage % 3 > 0) for passage in range(12) for _ in range(4)]
    apart, together = interval(values) or (0, 0), interval(values, clusters=[i // 4 for i in range(48)]) or (0, 0)
    assert together[1] - together[0] == pytest.approx(2 * (apart[1] - apart[0]), rel=0.15)


def test_all_right_in_few_clusters_is_not_certain() -> None:
    """Four clusters, Student's quantile with three degrees of freedom: from 4 / (4 + 3.182446 squared)."""
    assert interval([1.0] * 40, clusters=[i % 4 for i in range(40)]) == pytest.approx([4 / (4 + 3.182446**2), 1.0])


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 4), (17, 20), (48, 48)])
def test_outcomes_have_wilsons_interval(right: int, n: int) -> None:
    """Ours takes any n, scipy's whole ones."""
    wanted = binomtest(right, n).proportion_ci(method="wilson")
    assert interval([1.0] * right + [0.0] * (n - right)) == pytest.approx([wanted.low, wanted.high])


def test_a_paired_comparison_by_hand() -> None:
    """Five right to wrong, one wrong to right: McNemar 2 * (1 + 6) / 2^6."""
    twin = [1.0] * 5 + [0.0] + [1.0] * 4
    mine = [0.0] * 5 + [1.0] + [1.0] * 4
    got = paired(mine, twin)
    assert got is not None
    assert (got.lower, got.higher, got.n, got.difference) == (5, 1, 10, pytest.approx(-0.4))
    assert got.p == pytest.approx(2 * (1 + 6) / 2**6)
    assert got.stderr == pytest.approx(stderr([-1.0] * 5 + [1.0] + [0.0] * 4))


def test_nothing_to_compare() -> None:
    assert paired([], []) is None
    one = paired([1.0], [0.0])
    assert one is not None
    assert (one.stderr, one.p) == (None, 1.0)
    fewer = paired([0.5], [0.25])
    assert fewer is not None
    assert (fewer.stderr, fewer.ci95, fewer.p) == (None, None, None)
    same = paired([0.25, 0.5], [0.25, 0.5])
    assert same is not None
    assert (same.difference, same.ci95) == (0.0, [0.0, 0.0])
    numbers = paired([0.5, 0.25], [0.25, 0.25])
    assert numbers is not None
    assert numbers.p is None  # McNemar's test is one of outcomes
    with pytest.raises(ValueError, match="no pairs"):
        paired([1.0], [])


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (5, 0, 2 / 32),
        (8, 1, 2 * (1 + 9) / 512),
        (1, 8, 2 * (1 + 9) / 512),
        (2, 1, 1.0),  # 2 * (1 + 3) / 8, and no probability is above 1
        (0, 0, 1.0),
    ],
)
def test_mcnemars_exact_test_by_hand(lost: int, gained: int, p: float) -> None:
    """Of the pairs that changed, each direction is as likely as the other: a binomial with one half."""
    got = paired([0.0] * lost + [1.0] * (gained + 9), [1.0] * lost + [0.0] * gained + [1.0] * 9)
    assert got is not None
    assert got.p == pytest.approx(p)


def test_samples_that_share_clusters_have_no_mcnemar() -> None:
    change = paired([0.0, 1.0, 1.0], [1.0, 1.0, 1.0], clusters=["a", "a", "b"])
    assert change is not None
    assert change.p is None
    assert change.ci95 is not None


@pytest.mark.parametrize(
    ("lost", "wanted"),
    [
        (0, [-0.0741001296661, 0.0741001296661]),
        (48, [-1.0, -0.8517997406674]),
    ],
)
def test_no_change_in_48_pairs_does_not_prove_that_there_is_none(lost: int, wanted: list[float]) -> None:
    """Wanted: the roots of Tango's equation (Statistics in Medicine 17, 1998), found numerically."""
    change = paired([0.0] * lost + [1.0] * (48 - lost), [1.0] * 48)
    assert change is not None
    assert change.ci95 == pytest.approx(wanted)


def test_ten_of_100_lost_has_the_quantiles_of_a_binomial() -> None:
    """A resample loses binomial(100, 0.1), whose 2.5 and 97.5 % quantiles are 5 and 16."""
    got = paired([0.0] * 10 + [1.0] * 90, [1.0] * 100)
    assert got is not None
    assert got.ci95 == pytest.approx([-0.16, -0.05], abs=0.011)


def test_the_bootstrap_is_seeded() -> None:
    rng = np.random.default_rng(0)
    mine, twin = rng.random(30).tolist(), rng.random(30).tolist()
    assert paired(mine, twin, seed=1) == paired(mine, twin, seed=1)
    assert paired(mine, twin, seed=1) != paired(mine, twin, seed=2)


def test_counting_how_often_each_kind_is_drawn_is_the_bootstrap_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way for few kinds of samples agrees with drawing each one."""
    rng = np.random.default_rng(0)
    mine, twin = (rng.random((2, 200)) < 0.4).astype(float).tolist()
    clusters = [i // 3 for i in range(200)]
    quick = paired(mine, twin), paired(mine, twin, clusters=clusters)
    monkeypatch.setattr(statistics, "_FEW", 0)
    for fast, slow in zip(quick, (paired(mine, twin), paired(mine, twin, clusters=clusters)), strict=True):
        assert fast is not None
        assert slow is not None
        assert fast.ci95 == pytest.approx(slow.ci95, abs=0.01)


def coverage(hits: int, trials: int) -> None:
    """95 % of the intervals must hold the truth; a binomial share of them will, within four of its standard errors, and the
    bootstrap's percentile intervals are known to be a little short."""
    assert 0.92 <= hits / trials <= 0.985, hits / trials


def test_intervals_of_rates_and_means_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = {"rate": 0, "mean": 0, "clustered": 0}
    for _ in range(1000):
        outcomes = (rng.random(40) < 0.3).astype(float).tolist()
        low, high = interval(outcomes) or (0, 0)
        hits["rate"] += low <= 0.3 <= high
        low, high = interval(rng.normal(2.0, 3.0, 12).tolist()) or (0, 0)
        hits["mean"] += low <= 2.0 <= high
        shared = np.repeat(rng.normal(0.0, 1.0, 25), 4) + rng.normal(0.0, 0.5, 100)
        low, high = interval(shared.tolist(), clusters=[i // 4 for i in range(100)]) or (0, 0)
        hits["clustered"] += low <= 0.0 <= high
    for found in hits.values():
        coverage(found, 1000)


def test_intervals_that_ignore_clusters_are_far_too_short() -> None:
    """What the clustering is for: the same samples, taken for independent."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        shared = np.repeat(rng.normal(0.0, 1.0, 25), 4) + rng.normal(0.0, 0.5, 100)
        low, high = interval(shared.tolist()) or (0, 0)
        hits += low <= 0.0 <= high
    assert hits / 300 < 0.85


def test_bootstrap_intervals_of_paired_differences_hold_the_truth_as_often_as_they_say() -> None:
    """A policy that turns 20 % of the right answers wrong: difference -0.2 * 0.6."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        twin = rng.random(120) < 0.6
        mine = twin & (rng.random(120) < 0.8)
        got = paired(mine.astype(float).tolist(), twin.astype(float).tolist(), seed=trial)
        assert got is not None
        assert got.ci95 is not None
        hits += got.ci95[0] <= -0.12 <= got.ci95[1]
    coverage(hits, 300)


def test_rare_losses_are_not_denied() -> None:
    """3 % lost of 48: in 23 % of experiments no pair changes, and the bootstrap alone would be certain of a falsehood."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        got = paired((rng.random(48) >= 0.03).astype(float).tolist(), [1.0] * 48)
        assert got is not None
        assert got.ci95 is not None
        hits += got.ci95[0] <= -0.03 <= got.ci95[1]
    assert hits / 400 > 0.92


def test_intervals_of_outcomes_in_clusters_hold_the_truth_as_often_as_they_say() -> None:
    """30 passages, 6 questions each, mostly answered alike."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        values = (rng.random((30, 6)) < rng.beta(2, 1, 30)[:, None]).astype(float).ravel().tolist()
        low, high = interval(values, clusters=[i // 6 for i in range(180)]) or (0, 0)
        hits += low <= 2 / 3 <= high
    coverage(hits, 1000)
