"""Numbers of a summary, computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mikv.metrics.summary import stderr, summarize


def row(doc_id: int, correct: bool, **more: Any) -> dict[str, Any]:
    """A line of samples.jsonl with what a summary needs."""
    return {
        "doc_id": doc_id,
        "correct": correct,
        "nbytes": {"codes": 30, "scale": 10},
        "full_nbytes": 200,
        "kept_tokens": 10,
        "seen_tokens": 10,
        "compressed_tokens": 5,
        "ended": True,
        "seconds": {"prefill": 0.5, "decode": 0.25},
        **more,
    }


def rows(*correct: bool) -> list[dict[str, Any]]:
    return [row(doc_id, outcome) for doc_id, outcome in enumerate(correct)]


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


def test_value_error_and_wilson_interval_of_three_of_four() -> None:
    """Wilson: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) with z = 1.959964, p = 3/4, n = 4."""
    got = summarize(rows(True, True, True, False), None, [])
    assert got["value"] == 0.75
    assert got["n"] == 4
    assert got["stderr"] == pytest.approx(0.25)
    assert got["ci95"] == pytest.approx([0.300642, 0.954413], abs=1e-6)


def test_no_twin_no_difference() -> None:
    assert not {"difference", "lost", "gained"} & set(summarize(rows(True, False), None, []))


def test_difference_to_the_twin_is_paired_by_sample() -> None:
    """Right to wrong twice, wrong to right once, equal twice: -1/5; squares 3 - 1/5 = 14/5; 14/5 / 4 / 5 = 0.14."""
    mine = rows(False, False, True, True, False)
    full = {r["doc_id"]: r for r in reversed(rows(True, True, False, True, False))}  # order must not matter
    got = summarize(mine, full, [])
    assert (got["lost"], got["gained"]) == (2, 1)
    assert got["difference"] == pytest.approx(-0.2)
    assert got["difference_stderr"] == pytest.approx(0.14**0.5)


def test_twin_may_hold_more_samples_than_were_run() -> None:
    full = {r["doc_id"]: r for r in rows(True, True, True)}
    assert summarize([row(2, True)], full, [])["difference"] == 0.0


def test_size_and_kept_are_ratios_of_sums_not_means_of_ratios() -> None:
    """T8: a short and a long sample; the mean of the ratios would be 55 % of the bytes and 75 % of the tokens."""
    short = row(0, True, nbytes={"raw": 100}, full_nbytes=100, kept_tokens=10, seen_tokens=10)
    long = row(1, True, nbytes={"codes": 60, "scale": 30}, full_nbytes=900, kept_tokens=45, seen_tokens=90)
    got = summarize([short, long], None, [])
    assert got["size_percent"] == pytest.approx(100 * 190 / 1000)
    assert got["kept_percent"] == pytest.approx(100 * 55 / 100)
    assert got["nbytes"] == {"codes": 30.0, "raw": 50.0, "scale": 15.0}  # per sample; a missing part is 0 bytes
    assert list(got["nbytes"]) == sorted(got["nbytes"])
    assert got["full_nbytes"] == 500.0


def test_exercised_and_ended_are_counts_and_flags_are_rates() -> None:
    samples = [
        row(0, True, compressed_tokens=0, ended=True, breach=True, invented=False),
        row(1, True, compressed_tokens=1, ended=False, breach=False, invented=False),
        row(2, True, compressed_tokens=9, ended=False, breach=True, invented=False),
    ]
    got = summarize(samples, None, ["breach", "invented"])
    assert (got["exercised"], got["ended"]) == (2, 1)
    assert got["rates"] == pytest.approx({"breach": 2 / 3, "invented": 0.0})


def test_seconds_are_summed_by_phase() -> None:
    samples = [row(0, True), row(1, True, seconds={"prefill": 1.0, "decode": 2.0})]
    assert summarize(samples, None, [])["seconds"] == {"prefill": 1.5, "decode": 2.25}


@pytest.mark.parametrize(("correct", "interval"), [(True, [0.206549, 1.0]), (False, [0.0, 0.793451])])
def test_one_sample_has_an_interval_but_no_standard_error(correct: bool, interval: list[float]) -> None:
    """Wilson with n = 1: from 1 / (1 + z2) to 1, and mirrored."""
    got = summarize(rows(correct), {0: row(0, True)}, [])
    assert got["value"] == float(correct)
    assert got["stderr"] is got["difference_stderr"] is None
    assert got["ci95"] == pytest.approx(interval, abs=1e-6)
    assert got["lost"] == int(not correct)
