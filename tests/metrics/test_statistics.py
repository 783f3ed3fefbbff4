"""Intervals and tests: values by hand, by another implementation, and how often the interval holds the truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from mikv.metrics.statistics import Paired, interval, paired, stderr

Z2 = 1.959963984540054**2


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
    assert stderr(values, clusters=range(len(values))) == pytest.approx(wanted)  # clusters of one


def test_clustered_standard_error_by_hand() -> None:
    """Mean 1/2; residuals by cluster: a 2 - 2 * 1/2 = 1, b 0 - 3 * 1/2 = -3/2, c 1 - 1/2 = 1/2; squares 1 + 9/4 + 1/4 = 7/2;
    times 3 / 2 for three clusters: 21/4; root / 6."""
    values, clusters = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], ["a", "b", "a", "b", "b", "c"]
    assert stderr(values, clusters) == pytest.approx((21 / 4) ** 0.5 / 6)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_have_no_standard_error(values: list[float]) -> None:
    assert stderr(values) is None


def test_one_cluster_tells_nothing() -> None:
    assert stderr([1.0, 0.0, 1.0], ["a"] * 3) is None
    assert interval([1.0, 0.0, 1.0], clusters=["a"] * 3) is None
    assert interval([1.0, 0.5, 1.0], clusters=["a"] * 3) is None
    change = paired([1.0, 0.0, 1.0], [0.0, 0.0, 1.0], clusters=["a"] * 3)
    assert change is not None
    assert change.stderr is change.ci95 is None


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 4), (17, 20), (48, 48)])
def test_outcomes_have_wilsons_interval(right: int, n: int) -> None:
    wanted = binomtest(right, n).proportion_ci(method="wilson")
    assert interval([1.0] * right + [0.0] * (n - right)) == pytest.approx([wanted.low, wanted.high])


def test_other_values_have_students_interval() -> None:
    values = [0.3, 0.1, 0.35, 0.2]
    wanted = ttest_1samp(values, 0).confidence_interval()
    assert interval(values) == pytest.approx([wanted.low, wanted.high])
    assert interval([0.0, 0.0, 0.0], outcomes=False) == [0.0, 0.0]  # divergences
    assert interval([0.5]) is None
    assert interval([]) is None


def test_questions_on_one_passage_widen_the_interval() -> None:
    """Twelve passages with four questions each, all answered alike: as good as twelve questions, and no better."""
    values = [float(passage % 3 > 0) for passage in range(12) for _ in range(4)]
    clusters = [passage for passage in range(12) for _ in range(4)]
    apart, together = interval(values), interval(values, clusters=clusters)
    assert apart is not None
    assert together is not None
    assert together[1] - together[0] == pytest.approx(2 * (apart[1] - apart[0]), rel=0.15)
    assert 0 <= together[0] < 2 / 3 < together[1] <= 1


def test_all_right_in_few_clusters_is_not_certain() -> None:
    """Four clusters, Student's quantile with three degrees of freedom: from 4 / (4 + 3.182446 squared)."""
    assert interval([1.0] * 40, clusters=[i % 4 for i in range(40)]) == pytest.approx([4 / (4 + 3.182446**2), 1.0])


def twins(lost: int, gained: int, right: int, wrong: int) -> tuple[list[float], list[float]]:
    """Outcomes of a policy and of its twin with so many pairs of each kind."""
    return (
        [0.0] * lost + [1.0] * gained + [1.0] * right + [0.0] * wrong,
        [1.0] * lost + [0.0] * gained + [1.0] * right + [0.0] * wrong,
    )


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (5, 0, 2 / 32),
        (8, 1, 2 * (1 + 9) / 512),
        (1, 8, 2 * (1 + 9) / 512),
        (2, 1, 1.0),  # 2 * (1 + 3) / 8, and no probability is above 1
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemars_exact_test_by_hand(lost: int, gained: int, p: float) -> None:
    """Of the pairs that changed, each direction is as likely as the other: a binomial with one half."""
    mine, twin = twins(lost, gained, 10, 4)
    got = paired(mine, twin)
    assert got is not None
    assert (got.lower, got.higher, got.n) == (lost, gained, lost + gained + 14)
    assert got.difference == pytest.approx((gained - lost) / got.n)
    assert got.p == pytest.approx(p)


def test_values_that_are_no_outcomes_and_clusters_have_no_mcnemar() -> None:
    for change in (paired([0.2, 0.4], [0.2, 0.5]), paired([0.0, 1.0], [1.0, 1.0], clusters=["a", "b"])):
        assert change is not None
        assert change.p is None


def test_degenerate_pairs() -> None:
    assert paired([], []) is None
    assert paired([0.0], [1.0]) == Paired(-1.0, None, [-1.0, -1 + 2 * Z2 / (1 + Z2)], 1.0, 1, 0, 1)
    assert paired([0.5], [0.25]) == Paired(0.25, None, None, None, 0, 1, 1)
    with pytest.raises(ValueError, match="2 values have no pairs among 1"):
        paired([1.0, 0.0], [1.0])


@pytest.mark.parametrize(
    ("lost", "wanted"),
    [
        (0, [-0.0741001296661, 0.0741001296661]),
        (48, [-1.0, -0.8517997406674]),
    ],
)
def test_no_change_in_48_pairs_does_not_prove_that_there_is_none(lost: int, wanted: list[float]) -> None:
    """Tango's interval of 48 pairs, by finding the roots of his equation (the formula in Statistics in Medicine 17, 1998)."""
    change = paired(*twins(lost, 0, 48 - lost, 0))
    assert change is not None
    assert change.ci95 == pytest.approx(wanted)


def test_a_twin_with_the_same_divergences_is_the_same() -> None:
    change = paired([0.25, 0.5, 0.125], [0.25, 0.5, 0.125])
    assert change is not None
    assert (change.difference, change.stderr, change.ci95) == (0.0, 0.0, [0.0, 0.0])


def test_bootstrap_is_seeded_and_finds_the_binomial_quantiles() -> None:
    """Ten of 100 pairs lost, none gained: a resample loses binomial(100, 0.1), whose 2.5 and 97.5 % quantiles are 5 and 16."""
    mine, twin = twins(10, 0, 90, 0)
    got = paired(mine, twin, seed=3)
    assert got is not None
    assert got.ci95 == pytest.approx([-0.16, -0.05], abs=0.011)
    assert got == paired(mine, twin, seed=3)
    changes = np.random.default_rng(0).normal(size=300).tolist()  # more kinds of values than are drawn as counts
    many, other = paired(changes, [0.0] * 300, seed=1), paired(changes, [0.0] * 300, seed=2)
    assert many is not None
    assert other is not None
    assert many == paired(changes, [0.0] * 300, seed=1)
    assert many.ci95 != other.ci95
    assert many.stderr is not None
    assert many.ci95 == pytest.approx([many.difference - 1.96 * many.stderr, many.difference + 1.96 * many.stderr], abs=0.02)


def test_bootstrap_draws_whole_clusters() -> None:
    """Copies of each sample say nothing new."""
    mine, twin = twins(6, 2, 22, 10)
    once = paired(mine, twin)
    four = paired(mine * 4, twin * 4, clusters=[*range(40)] * 4)
    assert once is not None
    assert four is not None
    assert four.ci95 == pytest.approx(once.ci95, abs=0.026)
    assert four.stderr == pytest.approx(once.stderr)


Draw = Callable[[np.random.Generator], "tuple[list[float] | None, float]"]


def coverage(draw: Draw, rounds: int) -> float:
    """How often the interval of a drawn experiment holds the truth."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(rounds):
        bounds, truth = draw(rng)
        assert bounds is not None
        hits += bounds[0] <= truth <= bounds[1]
    return hits / rounds


def independent(rng: np.random.Generator) -> tuple[list[float] | None, float]:
    return interval((rng.random(40) < 0.9).astype(float).tolist()), 0.9


def small_normal(rng: np.random.Generator) -> tuple[list[float] | None, float]:
    """1.96 standard errors of five values would hold the truth in 88 %."""
    return interval(rng.normal(2.0, 1.0, 5).tolist()), 2.0


def shared_contexts(rng: np.random.Generator) -> tuple[list[float] | None, float]:
    """30 passages, 6 questions each, mostly answered alike: without clusters 70 %."""
    passage = rng.beta(2, 1, 30)
    values = (rng.random((30, 6)) < passage[:, None]).astype(float).ravel().tolist()
    return interval(values, clusters=[i // 6 for i in range(180)]), 2 / 3


def paired_outcomes(rng: np.random.Generator) -> tuple[list[float] | None, float]:
    """12 % lost, 4 % gained."""
    change = rng.choice([-1, 1, 0], 150, p=[0.12, 0.04, 0.84])
    mine = [float(c == 1 or (c == 0 and i % 2)) for i, c in enumerate(change)]
    got = paired(mine, [m - float(c) for m, c in zip(mine, change, strict=True)])
    assert got is not None
    assert got.p is not None  # they are outcomes
    return got.ci95, -0.08


def rare_losses(rng: np.random.Generator) -> tuple[list[float] | None, float]:
    """3 % lost of 48: in 23 % of experiments no pair changes, and the bootstrap alone would be certain of a falsehood."""
    mine = (rng.random(48) >= 0.03).astype(float).tolist()
    got = paired(mine, [1.0] * 48)
    assert got is not None
    return got.ci95, -0.03


def paired_clusters(rng: np.random.Generator) -> tuple[list[float] | None, float]:
    change = (rng.normal(0.1, 0.3, 40)[:, None] + rng.normal(0, 0.3, (40, 4))).ravel().tolist()
    got = paired(change, [0.0] * 160, clusters=[i // 4 for i in range(160)])
    assert got is not None
    return got.ci95, 0.1


@pytest.mark.parametrize(
    ("draw", "rounds", "low", "high"),
    [
        (independent, 2000, 0.93, 0.98),
        (small_normal, 2000, 0.93, 0.97),
        (shared_contexts, 1000, 0.92, 0.97),
        (paired_outcomes, 400, 0.92, 0.98),
        (rare_losses, 400, 0.92, 1.0),
        (paired_clusters, 200, 0.90, 0.99),
    ],
)
def test_intervals_hold_the_truth_about_95_times_in_100(draw: Draw, rounds: int, low: float, high: float) -> None:
    assert low <= coverage(draw, rounds) <= high
