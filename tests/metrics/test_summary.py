"""Numbers of a summary, computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mikv.metrics import summary


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


def summarize(samples: list[dict[str, Any]], full: Any = None, flags: Any = (), **more: Any) -> dict[str, Any]:
    """With the mean of the scores as the value."""
    scores = [s["score"] for s in samples if s["score"] is not None]
    return summary.summarize(samples, full, flags, **({"value": sum(scores) / max(1, len(scores))} | more))


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
    assert breach["difference_ci95"][0] >= 0
    assert "over_refusal" not in summarize(mine, full, ["breach", "over_refusal"])["rates"]  # it could never happen


def test_a_suites_risk_is_the_mean_of_its_parts_rates() -> None:
    """Errors of independent rates: sqrt(0.3^2 + 0.4^2) / 2."""
    one: dict[str, Any] = {"value": 0.2, "stderr": 0.3, "ci95": [0.1, 0.5], "lost": 3, "gained": 1}
    one |= {"difference": 0.1, "difference_stderr": 0.06, "difference_ci95": [0.0, 0.2]}
    two: dict[str, Any] = {"value": 0.6, "stderr": 0.4, "ci95": [0.6, 1.0], "lost": 0, "gained": 5}
    two |= {"difference": -0.3, "difference_stderr": 0.08, "difference_ci95": None}
    parts = {"a": {"rates": {"breach": one, "confused": two}}, "b": {"rates": {"wrong": two}}}
    got = summary.combine(parts, {"a": ["breach"], "b": ["wrong"]})
    assert got["value"] == pytest.approx(0.4)
    assert got["stderr"] == pytest.approx(0.25)
    assert got["ci95"] == pytest.approx([0.4 - 0.1 / 2, 0.4 + 0.5 / 2])  # sqrt(0.1^2 + 0^2) / 2, sqrt(0.3^2 + 0.4^2) / 2
    assert got["difference_ci95"] is None
    assert got["difference"] == pytest.approx(-0.1)
    assert got["difference_stderr"] == pytest.approx(0.05)
    assert (got["lost"], got["gained"]) == (3, 6)


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
    got = summarize(rows(1.0, 2.0, 3.0))
    assert got["stderr"] == pytest.approx(3**-0.5)
    assert got["ci95"] == pytest.approx([2 - 4.302653 * 3**-0.5, 2 + 4.302653 * 3**-0.5])


def test_a_value_that_is_no_mean_of_scores_has_no_interval_and_no_pairs() -> None:
    """A perplexity is made of all samples together."""
    for samples in (rows(None, None), rows(1.0, 3.0)):
        got = summarize(samples, {r["sample"]: r for r in samples}, value=17.5)
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
    assert [summarize(mine, full, lower_is_better=True)[name] for name in ("lost", "gained")] == [2, 1]
    assert [summarize(mine, full)[name] for name in ("lost", "gained")] == [1, 2]


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


def test_divergences_of_zero_are_no_outcomes() -> None:
    """The full cache's own divergence is 0, surely: Wilson's interval would reach up to 0.49 for four of them."""
    assert summarize(rows(0.0, 0.0, 0.0, 0.0), lower_is_better=True)["ci95"] == [0.0, 0.0]
