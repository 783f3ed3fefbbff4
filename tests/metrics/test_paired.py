"""Paired changes: published values, values by hand, and coverage, computed exactly where samples are independent."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import gammaln, xlogy
from scipy.stats import binomtest, norm
from simulated import SIZES, clustered, copied, sizes_of

from mikv.metrics import statistics
from mikv.metrics.paired import Paired, flip_test, holm, outcome_interval, paired, tango
from mikv.metrics.statistics import NORMAL, interval, stderr

RATES = [i / 100 for i in range(31)]  # of losses


def outcomes(lost: int, gained: int, n: int) -> Paired:
    """The comparison of n pairs of which so many were lost and gained; of the others half are right in both."""
    same = [float(i % 2) for i in range(n - lost - gained)]
    found = paired([0.0] * lost + [1.0] * gained + same, [1.0] * lost + [0.0] * gained + same, True)
    assert found is not None
    return found


def test_a_paired_comparison_by_hand() -> None:
    """Five right to wrong, one wrong to right: McNemar 2 * (1 + 6) / 2^6."""
    got = outcomes(5, 1, 10)
    assert (got.lower, got.higher, got.n, got.difference) == (5, 1, 10, pytest.approx(-0.4))
    assert got.p == pytest.approx(2 * (1 + 6) / 2**6)
    assert got.stderr == pytest.approx(stderr([-1.0] * 5 + [1.0] + [0.0] * 4))


@pytest.mark.parametrize(
    ("lost", "gained", "n", "level", "wanted"),
    [
        (16, 6, 161, 0.95, (-0.1240, -0.0054)),  # Cavo et al. 2012: R's contingencytables (Fagerland, Lydersen and Laake)
        (7, 1, 21, 0.95, (-0.517, -0.026)),  # Bentur et al. 2009: R's ratesci
        (25, 28, 618, 0.90, (-0.0148, 0.0247)),  # R's PropCIs::scoreci.mp
    ],
)
def test_intervals_that_others_print(lost: int, gained: int, n: int, level: float, wanted: tuple[float, float]) -> None:
    low, high = tango(np.array(lost), np.array(gained), np.array(n), float(norm.ppf((1 + level) / 2)))
    assert (float(low), float(high)) == pytest.approx(wanted, abs=5e-4)
    if level == 0.95:
        assert outcomes(lost, gained, n).ci95 == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize(("lost", "gained", "n"), [(2, 0, 4), (1, 0, 32), (5, 2, 20), (0, 3, 100), (40, 10, 60)])
def test_bounds_are_where_the_score_test_just_rejects(lost: int, gained: int, n: int) -> None:
    """With the variance that is most likely under the bound, found by a search instead of a formula."""
    for bound, wanted in zip(outcomes(lost, gained, n).ci95 or (), (NORMAL, -NORMAL), strict=True):
        least, most = max(0.0, -bound), (1 - bound) / 2  # of the rate of losses

        def unlikely(rate: float, bound: float = bound) -> float:
            chances = np.clip([rate, rate + bound, 1 - 2 * rate - bound], 0, 1)
            return -float(xlogy([lost, gained, n - lost - gained], chances).sum())

        rate = minimize_scalar(unlikely, bounds=(least, most), method="bounded", options={"xatol": 1e-10}).x
        score = (gained - lost - n * bound) / (n * (2 * rate + bound - bound**2)) ** 0.5
        assert score == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("n", [1, 20, 48, 300])
def test_ends_are_what_they_must_be(n: int) -> None:
    """No change: -+ z2 / (n + z2). All lost: from -1 to -1 + 2 z2 / (n + z2); all gained: mirrored."""
    reach = NORMAL**2 / (n + NORMAL**2)
    assert outcomes(0, 0, n).ci95 == pytest.approx([-reach, reach])
    assert outcomes(n, 0, n).ci95 == pytest.approx([-1.0, -1 + 2 * reach])
    assert outcomes(0, n, n).ci95 == pytest.approx([1 - 2 * reach, 1.0])


def test_one_loss_is_no_surer_than_none() -> None:
    """What a bootstrap made of one loss in 100: from -3 to 0, where no loss at all leaves -3.7 open."""
    none, one = outcomes(0, 0, 100).ci95, outcomes(1, 0, 100).ci95
    assert none is not None
    assert one is not None
    assert one[0] < none[0] < -0.036
    assert 0 < one[1] < none[1]


@pytest.mark.parametrize("n", [5, 32, 100])
def test_a_loss_more_lowers_both_bounds_and_a_gain_more_raises_them(n: int) -> None:
    lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = lost + gained <= n
    for bound in tango(lost, np.minimum(gained, n - lost), np.array(n), NORMAL):
        bound = np.where(possible, bound, np.nan)
        assert np.nanmax(np.diff(bound, axis=0)) < 0
        assert np.nanmin(np.diff(bound, axis=1)) > 0


def probabilities(lost: np.ndarray, gained: np.ndarray, n: int, rates: tuple[float, float]) -> np.ndarray:
    """Of counts of n independent pairs (multinomial)."""
    counts, chances = (lost, gained, n - lost - gained), (*rates, 1 - sum(rates))
    ways = gammaln(n + 1) - sum(gammaln(count + 1) for count in counts)
    return np.exp(ways + sum(xlogy(count, chance) for count, chance in zip(counts, chances, strict=True)))


def held(bounds: tuple[np.ndarray, np.ndarray], difference: float) -> np.ndarray:
    return (bounds[0] <= difference) & (difference <= bounds[1])


@pytest.mark.parametrize("gain", [0.0, 0.05])
@pytest.mark.parametrize("n", [20, 32, 100, 300])
def test_differences_of_outcomes_are_held_exactly_as_often_as_they_should_be(n: int, gain: float) -> None:
    """No simulation: all counts that can occur, with their probabilities. Nor are intervals needlessly wide: where three losses
    are expected, or more, none holds more than 0.995."""
    most = (min(n, int(0.3 * n + 7 * n**0.5)), min(n, int(gain * n + 7 * n**0.5)) if gain else 0)
    lost, gained = (counts.ravel() for counts in np.meshgrid(*(np.arange(k + 1) for k in most), indexing="ij"))
    lost, gained = lost[lost + gained <= n], gained[lost + gained <= n]
    bounds = tango(lost, gained, np.array(n), NORMAL)
    for loss in RATES:
        chances = probabilities(lost, gained, n, (loss, gain))
        assert chances.sum() == pytest.approx(1, abs=1e-6)
        coverage = chances[held(bounds, gain - loss)].sum()
        assert coverage >= 0.93
        assert coverage <= 0.995 or loss * n < 3
        assert coverage >= 0.999 or loss + gain > 0


@pytest.mark.parametrize("n", [20, 32, 100, 300])
def test_between_whole_per_cents_coverage_falls_a_little_lower_in_narrow_places(n: int) -> None:
    """It jumps where a bound passes the truth: the lowest values are beside the bounds. Losses alone: counts are then few."""
    lost = np.arange(n + 1)
    bounds = tango(lost, 0 * lost, np.array(n), NORMAL)
    jumps = np.concatenate([-bound[(bound > -0.3) & (bound < 0)] for bound in bounds])
    beside = np.concatenate([jumps - 1e-9, jumps + 1e-9])
    coverage = [probabilities(lost, 0 * lost, n, (rate, 0.0))[held(bounds, -rate)].sum() for rate in beside]
    assert min(coverage) >= 0.925


def test_intervals_hold_through_the_door_that_a_run_uses() -> None:
    """3 % lost of 32, and 10 % (of which a bootstrap held 0.865)."""
    rng = np.random.default_rng(0)
    for loss in (0.03, 0.1):
        hits = 0
        for _ in range(400):
            got = paired((rng.random(32) >= loss).astype(float).tolist(), [1.0] * 32, True)
            assert got is not None
            assert got.ci95 is not None
            hits += got.ci95[0] <= -loss <= got.ci95[1]
        assert hits / 400 >= 0.93


CLUSTERS = list(itertools.product(SIZES, (10, 20, 50), (0.2, 0.5, 0.8)))


@pytest.mark.parametrize("draw", [clustered, copied])
def test_clustered_differences_are_held_too_and_without_needless_width(draw: Callable[..., Any]) -> None:
    """Clusters of 2 to 10, 10 to 50 of them, correlations of 0.2 to 0.8. Taken for independent, the same samples are held far
    too seldom."""
    rng = np.random.default_rng(0)
    kept, naive, needless = [], [], []
    for (kind, groups, correlation), rates in itertools.product(CLUSTERS, ((0.02, 0), (0.1, 0), (0.3, 0), (0.1, 0.05))):
        sizes = sizes_of(kind, groups)
        lost, gained = draw(rng, 1000, sizes, correlation, *rates)
        truth = rates[1] - rates[0]
        kept.append(held(outcome_interval(lost, gained, sizes), truth).mean())
        naive.append(held(tango(lost.sum(-1), gained.sum(-1), sizes.sum(), NORMAL), truth).mean())
        needless += [kept[-1]] if rates[0] >= 0.1 and groups >= 20 else []
    assert min(kept) >= 0.92
    assert np.mean(needless) <= 0.98
    assert min(naive) < 0.6


def test_a_design_effect_from_few_changes_alone_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is begun with something for: 50 clusters of 10, of which hardly any is lost, but as a whole."""
    sizes = sizes_of("10", 50)
    lost, gained = copied(np.random.default_rng(0), 1000, sizes, 0.8, 0.02, 0.0)
    assert held(outcome_interval(lost, gained, sizes), -0.02).mean() >= 0.94
    monkeypatch.setattr(statistics, "PRIOR_CLUSTERS", 1e-9)
    assert held(outcome_interval(lost, gained, sizes), -0.02).mean() < 0.8


@pytest.mark.parametrize(("kind", "groups"), itertools.product(SIZES, (10, 20, 50)))
def test_in_clusters_a_loss_more_never_raises_the_lower_bound(kind: str, groups: int) -> None:
    """Wherever it falls: one cluster after the other, each in turn, at random; up to half of all samples. The first one would
    raise it, were a design effect estimated from it alone."""
    rng, sizes = np.random.default_rng(0), sizes_of(kind, groups)
    owner = np.repeat(np.arange(groups), sizes)
    turn = np.concatenate([np.arange(size) for size in sizes])
    for order in (owner, owner[np.lexsort((owner, turn))], *(rng.permutation(owner) for _ in range(5))):
        lost = np.zeros((len(order) // 2 + 1, groups))
        for i, cluster in enumerate(order[: len(lost) - 1]):
            lost[i + 1] = lost[i]
            lost[i + 1, cluster] += 1
        low, _ = outcome_interval(lost, np.zeros_like(lost), sizes)
        assert np.diff(low).max() <= 0


def test_clusters_of_one_are_no_clusters_and_one_cluster_says_nothing() -> None:
    mine, theirs = [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]
    assert paired(mine, theirs, True, list("abcd")) == paired(mine, theirs, True)
    alone = paired(mine, theirs, True, list("aaaa"))
    assert alone is not None
    assert (alone.stderr, alone.ci95, alone.p) == (None, None, 1.0)


def test_nothing_to_compare() -> None:
    assert paired([], [], True) is None
    one = paired([1.0], [0.0], True)
    assert one is not None
    assert (one.stderr, one.p) == (None, 1.0)
    with pytest.raises(ValueError, match="no pairs"):
        paired([1.0], [], True)
    with pytest.raises(ValueError, match=r"0\.5 among outcomes"):
        paired([1.0, 0.0], [1.0, 0.5], True)


def test_numbers_have_students_interval_and_no_test() -> None:
    mine, theirs = [0.5, 0.25, 1.0, 0.0], [0.25, 0.25, 0.0, 1.0]
    got = paired(mine, theirs, False, list("aabc"))
    assert got is not None
    assert got.p is None
    assert got.ci95 == interval([0.25, 0.0, 1.0, -1.0], False, list("aabc"))
    assert (got.lower, got.higher) == (1, 2)


def test_numbers_that_did_not_change_say_nothing_of_how_far_they_could() -> None:
    """Also where they are all 0, as the divergences of the full cache from itself: not outcomes of which none changed."""
    for values in ([0.25, 0.5], [0.0, 0.0], [1.0, 0.0]):
        same = paired(values, values, False)
        assert same is not None
        assert (same.difference, same.ci95, same.p) == (0.0, None, None)


@pytest.mark.parametrize(("lost", "gained"), [(5, 0), (8, 1), (1, 8), (2, 1), (0, 0), (30, 12), (400, 350)])
def test_without_clusters_it_is_mcnemars_exact_test(lost: int, gained: int) -> None:
    """Of the pairs that changed, each direction is as likely as the other: a binomial with one half."""
    wanted = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    assert outcomes(lost, gained, lost + gained + 9).p == pytest.approx(wanted)


def test_in_clusters_whole_clusters_are_flipped() -> None:
    """Changes -3, -2, 1 and 0: sums of all 8 ways to flip the first three are +-6, +-4, +-2, +-0, of which 4 are at least 4."""
    assert flip_test(np.array([-3.0, -2.0, 1.0, 0.0])) == pytest.approx(4 / 8)
    mine = [0.0] * 5 + [1.0] * 3
    theirs = [1.0] * 5 + [0.0, 1.0, 1.0]
    got = paired(mine, theirs, True, list("aaabbcdd"))
    assert got is not None
    assert got.p == pytest.approx(4 / 8)
    changes = np.array([2, -1, 3, 3, -2, 1])
    sums = [abs(np.dot(signs, changes)) for signs in itertools.product((1, -1), repeat=6)]
    assert flip_test(changes) == pytest.approx(np.mean(np.array(sums) >= abs(changes.sum())))


def test_the_test_of_clusters_keeps_its_level_where_mcnemars_does_not() -> None:
    """30 clusters of up to 10 samples that are alike, losses and gains as likely: p below 0.05 in at most 5 % of trials."""
    rng, sizes = np.random.default_rng(0), sizes_of("mixed", 30)
    lost, gained = clustered(rng, 1000, sizes, 0.7, 0.15, 0.15)
    clusters = np.mean([flip_test(change) < 0.05 for change in gained - lost])
    samples = np.mean([binomtest(int(a), int(a + b)).pvalue < 0.05 for a, b in zip(lost.sum(-1), gained.sum(-1), strict=True)])
    assert clusters <= 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5
    assert samples > 0.2


def test_holms_adjusted_p_values_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; none may be below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([0.03, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([]) == []


def test_holm_keeps_the_level_of_a_family() -> None:
    """Ten tests without reason: the smallest p is below 0.05 in 40 % of families, the smallest adjusted one in 5 %."""
    rng = np.random.default_rng(0)
    families = rng.random((2000, 10))
    assert np.mean(families.min(axis=1) < 0.05) > 0.35
    assert np.mean([min(holm(family)) < 0.05 for family in families.tolist()]) < 0.06
