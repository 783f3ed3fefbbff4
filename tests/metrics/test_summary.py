"""Numbers of a summary, computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mikv.metrics import summary
from mikv.metrics.combine import combine


def row(doc_id: int, score: float | None, **more: Any) -> dict[str, Any]:
    """A line of samples.jsonl with what a summary needs."""
    return {
        "sample": str(doc_id),
        "score": score,
        "cut_tokens": 0,
        "nbytes": {"codes": 30, "scale": 10},
        "full_nbytes": 200,
        "kept_tokens": 10,
        "seen_tokens": 10,
        "compressed_tokens": 5,
        "ended": True,
        "seconds": {"prefill": 0.5, "decode": 0.25},
        **more,
    }


def rows(*scores: float | None) -> list[dict[str, Any]]:
    return [row(doc_id, score) for doc_id, score in enumerate(scores)]


def summarize(
    samples: list[dict[str, Any]], full: Any = None, flags: Any = (), kind: summary.Kind = "outcome", **more: Any
) -> dict[str, Any]:
    """With the mean of the scores as the value."""
    scores = [s["score"] for s in samples if s["score"] is not None]
    return summary.summarize(samples, full, flags, kind=kind, **({"value": sum(scores) / max(1, len(scores))} | more))


def by_sample(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {r["sample"]: r for r in samples}


def test_value_error_and_wilson_interval_of_three_of_four() -> None:
    """Wilson: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) with z = 1.959964, p = 3/4, n = 4."""
    got = summarize(rows(True, True, True, False))
    assert got["value"] == 0.75
    assert got["n"] == 4
    assert got["stderr"] == pytest.approx(0.25)
    assert got["ci95"] == pytest.approx([0.300642, 0.954413], abs=1e-6)


def test_no_twin_no_difference() -> None:
    assert not {"difference", "lost", "gained"} & set(summarize(rows(True, False)))


def test_difference_to_the_twin_is_paired_by_sample() -> None:
    """Right to wrong twice, wrong to right once, equal twice: -1/5; squares 3 - 1/5 = 14/5; 14/5 / 4 / 5 = 0.14."""
    mine = rows(False, False, True, True, False)
    full = {r["sample"]: r for r in reversed(rows(True, True, False, True, False))}  # order must not matter
    got = summarize(mine, full)
    assert (got["lost"], got["gained"]) == (2, 1)
    assert got["difference"] == pytest.approx(-0.2)
    assert got["difference_stderr"] == pytest.approx(0.14**0.5)


def test_twin_may_hold_more_samples_than_were_run() -> None:
    full = {r["sample"]: r for r in rows(True, True, True)}
    assert summarize([row(2, True)], full)["difference"] == 0.0


def test_size_and_kept_are_ratios_of_sums_not_means_of_ratios() -> None:
    """T8: a short and a long sample; the mean of the ratios would be 55 % of the bytes and 75 % of the tokens."""
    short = row(0, True, nbytes={"raw": 100}, full_nbytes=100, kept_tokens=10, seen_tokens=10)
    long = row(1, True, nbytes={"codes": 60, "scale": 30}, full_nbytes=900, kept_tokens=45, seen_tokens=90)
    got = summarize([short, long])
    assert got["size_percent"] == pytest.approx(100 * 190 / 1000)
    assert got["kept_percent"] == pytest.approx(100 * 55 / 100)
    assert got["nbytes"] == {"codes": 30.0, "raw": 50.0, "scale": 15.0}  # per sample; a missing part is 0 bytes
    assert list(got["nbytes"]) == sorted(got["nbytes"])
    assert got["full_nbytes"] == 500.0


def test_exercised_cut_and_unended_are_counts_and_flags_are_rates() -> None:
    samples = [
        row(0, True, compressed_tokens=0, ended=True, breach=True, invented=False),
        row(1, True, compressed_tokens=1, ended=False, breach=False, invented=False),
        row(2, True, compressed_tokens=9, ended=False, cut_tokens=7, breach=True, invented=False),
    ]
    got = summarize(samples, None, ["breach", "invented"])
    assert (got["exercised"], got["unended"], got["cut"], got["cut_tokens"]) == (2, 2, 1, 7)
    assert {flag: rate["value"] for flag, rate in got["rates"].items()} == pytest.approx({"breach": 2 / 3, "invented": 0.0})


def test_a_rate_counts_the_samples_in_which_its_outcome_can_happen() -> None:
    """Four of six are asked for the secret; three of these tell it, one with the full cache: 3/4, +1/2."""
    told = [True, True, True, False, None, None]
    with_full = [True, False, False, False, None, None]
    mine = [row(i, 1.0, breach=b) for i, b in enumerate(told)]
    full = {r["sample"]: r for r in (row(i, 1.0, breach=b) for i, b in enumerate(with_full))}
    breach = summarize(mine, full, ["breach", "over_refusal"])["rates"]["breach"]
    assert (breach["value"], breach["n"], breach["difference"]) == (0.75, 4, 0.5)
    assert (breach["lost"], breach["gained"]) == (2, 0)  # more breaches are worse
    assert breach["mcnemar_p"] == pytest.approx(0.5)  # 2 * (1/2)^2
    assert breach["ci95"] == pytest.approx([0.300642, 0.954413], abs=1e-6)  # Wilson, 3 of 4
    assert breach["difference_ci95"] == pytest.approx([-0.234836, 0.849961], abs=1e-6)  # Tango's, 2 of 4
    assert "over_refusal" not in summarize(mine, full, ["breach", "over_refusal"])["rates"]  # it could never happen


def suite(*parts: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What `combine` makes of parts with the risk `bad`, beside a full cache with which none is; and the parts' rates."""
    own = {str(i): part for i, part in enumerate(parts)}
    whole = {name: by_sample([{**r, "bad": False} for r in part]) for name, part in own.items()}
    summaries = {name: summarize(part, whole[name], ["bad"]) for name, part in own.items()}
    return combine(own, whole, summaries, {name: ["bad"] for name in own}), {n: s["rates"]["bad"] for n, s in summaries.items()}


def bad(count: int, n: int, prefix: str = "", **more: Any) -> list[dict[str, Any]]:
    return [row(i, 1.0, bad=i < count, **more) | {"sample": f"{prefix}{i}"} for i in range(n)]


def test_a_suites_risk_is_the_mean_of_its_parts_rates() -> None:
    """Errors of independent rates are added as squares, and so are the distances to their bounds."""
    got, rates = suite(bad(3, 12, "a"), bad(6, 10, "b"))
    a, b = rates.values()
    assert got["value"] == got["difference"] == pytest.approx((0.25 + 0.6) / 2)
    assert got["stderr"] == got["difference_stderr"] == pytest.approx((a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5 / 2)
    for name, bounds in (("value", "ci95"), ("difference", "difference_ci95")):
        below = sum((rate[name] - rate[bounds][0]) ** 2 for rate in (a, b)) ** 0.5 / 2
        above = sum((rate[bounds][1] - rate[name]) ** 2 for rate in (a, b)) ** 0.5 / 2
        assert got[bounds] == pytest.approx([got[name] - below, got[name] + above])
    assert (got["lost"], got["gained"], got["mcnemar_p"]) == (9, 0, None)


def test_parts_in_which_nothing_happened_keep_their_width() -> None:
    got, rates = suite(bad(0, 12, "a"), bad(0, 12, "b"))
    assert got["ci95"] == pytest.approx([0.0, rates["0"]["ci95"][1] / 2**0.5])
    assert got["difference_ci95"][0] < 0 < got["difference_ci95"][1]


def test_parts_that_share_their_contexts_are_as_sure_as_one() -> None:
    """The same attacks on the same defences, asked twice: no more is known. Names of samples differ, contexts don't."""
    one = [{**r, "cluster": str(i)} for i, r in enumerate(bad(300, 1200, "a"))]
    got, rates = suite(one, [{**r, "sample": f"b{r['sample']}"} for r in one])
    for field in ("stderr", "ci95", "difference_stderr", "difference_ci95"):
        assert got[field] == pytest.approx(rates["0"][field], rel=2e-3)


def test_parts_that_share_their_contexts_are_not_independent_because_nothing_happened() -> None:
    """Correlation 0.6: sqrt(1 + 1 + 2 * 0.6) / 2 of the distance of one part; in other contexts sqrt(2) / 2."""
    same = [[{**r, "cluster": str(i)} for i, r in enumerate(bad(0, 20, prefix))] for prefix in "ab"]
    for (got, rates), wanted in ((suite(*same), 3.2), (suite(bad(0, 20, "a"), bad(0, 20, "b")), 2)):
        assert got["ci95"][1] == pytest.approx(rates["0"]["ci95"][1] * wanted**0.5 / 2)


def test_risks_that_exclude_each_other_are_surer_but_not_by_a_few_events() -> None:
    """An answer is wrong in one way or in the other. If each is 1/2, their mean is 1/2, all the surer the more there are."""
    widths = []
    for n in (2, 12, 2000):
        samples = [row(i, 0.0, one=i < n // 2, other=i >= n // 2) for i in range(n)]
        part = summarize(samples, None, ["one", "other"])
        got = combine({"a": samples}, None, {"a": part}, {"a": ["one", "other"]})
        one = part["rates"]["one"]["ci95"]
        widths.append((got["ci95"][1] - got["ci95"][0]) / (one[1] - one[0]))
        assert "difference" not in got
    assert widths[0] > 0.7
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] < 0.1


def test_the_mean_of_parts_with_shared_contexts_holds_the_truth() -> None:
    """40 defences, asked in two parts, 5 % told in each; where one tells, the other does in half of the cases."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        copied = rng.random(40) < 0.5
        first = rng.random(40) < 0.05
        second = np.where(copied, first, rng.random(40) < 0.05)
        parts = [
            [row(i, 1.0, bad=bool(told), cluster=str(i)) | {"sample": f"{part}{i}"} for i, told in enumerate(of_it)]
            for part, of_it in enumerate((first, second))
        ]
        low, high = suite(*parts)[0]["difference_ci95"]
        hits += low <= 0.05 <= high
    assert hits / 400 >= 0.93


def test_a_suite_has_no_interval_where_a_part_has_none() -> None:
    """A part with one context, and a risk that no part has."""
    got, _ = suite(bad(3, 12, "a", cluster="x"), bad(6, 10, "b"))
    assert (got["ci95"], got["difference_ci95"], got["stderr"]) == (None, None, None)
    samples = rows(1.0)
    assert combine({"a": samples}, None, {"a": summarize(samples)}, {"a": ["never"]}) == {}


def test_samples_that_share_a_context_are_one_cluster() -> None:
    """Two passages with three equal answers each are two observations, not six."""
    samples = [row(i, float(i < 3), cluster="ab"[i // 3]) for i in range(6)]
    assert summarize(samples)["stderr"] == pytest.approx(0.5)
    alone = [row(i, float(i < 3), cluster=str(i)) for i in range(6)]
    assert summarize(alone)["stderr"] == pytest.approx((1.5 / 5 / 6) ** 0.5)


def test_tiers_of_the_system_prompt_are_means_over_samples() -> None:
    tiers = [{"16": 0.5, "2": 0.5}, {"16": 0.2, "2": 0.8}, {"16": 1.0}]
    got = summarize([row(i, 1.0, system_tiers=t) for i, t in enumerate(tiers)])
    assert got["system_tiers"] == pytest.approx({"16": 1.7 / 3, "2": 1.3 / 3})
    assert "system_tiers" not in summarize(rows(1.0))


def test_seconds_are_summed_by_phase() -> None:
    samples = [row(0, True), row(1, True, seconds={"prefill": 1.0, "decode": 2.0})]
    assert summarize(samples)["seconds"] == {"prefill": 1.5, "decode": 2.25}


@pytest.mark.parametrize(("correct", "interval"), [(True, [0.206549, 1.0]), (False, [0.0, 0.793451])])
def test_one_sample_has_an_interval_but_no_standard_error(correct: bool, interval: list[float]) -> None:
    """Wilson with n = 1: from 1 / (1 + z2) to 1, and mirrored."""
    got = summarize(rows(correct), {"0": row(0, True)}, [])
    assert got["value"] == float(correct)
    assert got["stderr"] is got["difference_stderr"] is None
    assert got["ci95"] == pytest.approx(interval, abs=1e-6)
    assert got["lost"] == int(not correct)


def test_scores_that_are_no_yes_or_no_have_students_interval() -> None:
    """Mean 2, standard error 1/sqrt(3), t of 2 degrees of freedom 4.302653."""
    got = summarize(rows(1.0, 2.0, 3.0), kind="number")
    assert got["stderr"] == pytest.approx(3**-0.5)
    assert got["ci95"] == pytest.approx([2 - 4.302653 * 3**-0.5, 2 + 4.302653 * 3**-0.5])


def test_a_value_that_is_no_mean_of_scores_has_no_interval_and_no_pairs() -> None:
    """A perplexity is made of all samples together."""
    for samples in (rows(None, None), rows(1.0, 3.0)):
        got = summarize(samples, {r["sample"]: r for r in samples}, value=17.5, kind="number")
        assert (got["value"], got["stderr"], got["ci95"], got["n"]) == (17.5, None, None, 2)
        assert "difference" not in got


def test_only_samples_with_a_score_count_for_the_metric() -> None:
    """Two subtasks, one of which decides; bytes are those of both."""
    samples = [row(0, 1.0), row(1, 0.0), row(2, None, full_nbytes=600)]
    got = summarize(samples, {r["sample"]: r for r in rows(1.0, 1.0, None)})
    assert (got["value"], got["n"], got["samples"], got["lost"]) == (0.5, 2, 3, 1)
    assert got["size_percent"] == pytest.approx(100 * 120 / 1000)


def test_lost_and_gained_follow_the_direction_of_the_metric() -> None:
    full = {r["sample"]: r for r in rows(0.0, 0.0, 0.5)}
    mine = rows(0.2, 0.1, 0.3)
    for lower, wanted in ((True, [2, 1]), (False, [1, 2])):
        got = summarize(mine, full, kind="number", lower_is_better=lower)
        assert [got[name] for name in ("lost", "gained")] == wanted
        assert got["mcnemar_p"] is None


def test_fidelity_is_a_mean_over_samples_and_absent_where_it_was_not_measured() -> None:
    some = [row(i, 1.0, kl=kl, agreement=1 - kl, nll_change=2 * kl) for i, kl in enumerate((0.1, 0.3))]
    got = summarize(some)
    assert [got[name] for name in ("kl", "agreement", "nll_change")] == pytest.approx([0.2, 0.8, 0.4])
    for name in ("kl", "agreement"):  # Student's, 12.7 standard errors of 0.1, within what is possible
        low, high = got[f"{name}_ci95"]
        assert (low, high) == pytest.approx((0.0, 0.2 + 1.270620) if name == "kl" else (0.0, 1.0), abs=1e-5)
    assert got["nll_change_ci95"] == pytest.approx([0.4 - 2.541241, 0.4 + 2.541241], abs=1e-5)
    assert "kl" not in summarize([*some, row(2, 1.0)])


def test_nothing_is_said_about_limits_where_nothing_is_generated() -> None:
    scored = row(0, 1.0)
    del scored["ended"]
    assert summarize([scored])["unended"] is None


def test_a_divergence_is_a_difference_itself_and_has_no_other() -> None:
    """Of the full cache it is 0, surely: taken for outcomes of which none happened it had an interval up to 0.49, a change of
    +-0.49 and a p of 1. Of a policy it is what differs."""
    full = rows(0.0, 0.0, 0.0, 0.0)
    for mine in (full, rows(0.1, 0.2, 0.1, 0.4)):
        got = summarize(mine, by_sample(full), kind="divergence", lower_is_better=True)
        assert not {"difference", "difference_ci95", "difference_stderr", "mcnemar_p", "lost", "gained"} & set(got)
        assert got["ci95"] is None if mine is full else got["ci95"][0] >= 0
    assert got["ci95"] == pytest.approx(
        [0.0, 0.2 + 3.18244631 * (0.06 / 3 / 4) ** 0.5]
    )  # Student's, and no divergence is below 0


def test_numbers_that_came_out_as_0_or_1_are_no_outcomes() -> None:
    """Three answers with an F1 of 1 and one of 0: Student's interval, no test."""
    mine, full = rows(1.0, 1.0, 1.0, 0.0), rows(1.0, 1.0, 1.0, 1.0)
    got = summarize(mine, by_sample(full), kind="number")
    assert got["ci95"] == pytest.approx([0.75 - 3.18244631 / 4, 0.75 + 3.18244631 / 4])
    assert got["difference_ci95"] == pytest.approx([-0.25 - 3.18244631 / 4, -0.25 + 3.18244631 / 4])
    assert got["mcnemar_p"] is None
    assert summarize(full, by_sample(full), kind="number")["ci95"] is None


def test_a_flag_that_is_a_number_is_no_outcome() -> None:
    """What a score that is a share misses of 1: nothing missed in three samples says nothing, no breach in three is a rate."""
    full = [row(i, 1.0, wrong=0.0, breach=False) for i in range(3)]
    rates = summarize(full, by_sample(full), ["wrong", "breach"])["rates"]
    assert (rates["wrong"]["ci95"], rates["wrong"]["mcnemar_p"]) == (None, None)
    assert rates["breach"]["ci95"] == pytest.approx([0.0, 3.841459 / (3 + 3.841459)])
    assert rates["breach"]["mcnemar_p"] == 1.0


def test_changes_of_samples_that_share_a_context_are_clustered() -> None:
    """Six passages with four questions each, all lost on two of them: as sure as of fewer than 24 samples, and the test flips
    passages: 2 of 2 lost has p = 2/4. Taken for independent it would be 2 / 2^8."""
    lost = [float(i >= 8) for i in range(24)]
    mine = [row(i, score, cluster=str(i // 4), breach=score == 0) for i, score in enumerate(lost)]
    full = by_sample([row(i, 1.0, breach=False) for i in range(24)])
    apart = [{**r, "cluster": r["sample"]} for r in mine]
    together, independent = summarize(mine, full, ["breach"]), summarize(apart, full, ["breach"])
    for some, other in ((together, independent), (together["rates"]["breach"], independent["rates"]["breach"])):
        assert (some["mcnemar_p"], other["mcnemar_p"]) == (pytest.approx(0.5), pytest.approx(2 / 2**8))
        for bounds in ("ci95", "difference_ci95"):
            assert some[bounds][1] - some[bounds][0] > 1.3 * (other[bounds][1] - other[bounds][0])
