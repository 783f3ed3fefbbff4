"""Tables fit the terminal: no cell is cut, no number folded, and it is said what is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from written_run import read_summary, write_run

from mikv.columns import aligned, number, two_digits, with_intervals
from mikv.sweep.folder import Outcome, SweepFolder, note_outcome
from mikv.sweep.overview import print_overview
from mikv.sweep.status import status
from mikv.table import print_table

Row = dict[str, Any]

LABELS = ["full", "h2o 20%", "mikv 20% 16/2 no balancer", "mikv 20% 16/2 no balancer, group 16, contiguous"]


def rate(value: float, difference: float | None = None) -> Row:
    made: Row = {"value": value, "ci95": [max(0.0, value - 0.05), min(1.0, value + 0.05)], "n": 100}
    return made if difference is None else made | {"difference": difference}


def row(label: str, value: float, **other: Any) -> Row:
    """A summary row of a task with two flags and two scores."""
    return {
        "policy": "full" if label == "full" else "other",
        "label": label,
        "model": "smollm2-recall",
        "task": "linerecall",
        "question": "visible",
        "metric": "accuracy",
        "lower_is_better": False,
        "value": value,
        "n": 100,
        "ci95": [value - 0.07, min(1.0, value + 0.04)],
        "size_percent": 100.0 if label == "full" else 36.8125,
        "size_percent_paper": 35.0,
        "difference": value - 1,
        "difference_ci95": [value - 1.07, value - 0.93],
        "lost": 7,
        "gained": 0,
        "kl": 0.0461,
        "kl_ci95": [0.04, 0.05],
        "agreement": 0.988,
        "rates": {"confused": rate(0.02), "over_refusal": rate(0.05)},
        "scores": {"accuracy": value, "strict_match": value / 2},
    } | other


ROWS = [row("full", 1.0), row(LABELS[1], 0.0, ci95=[0.0, 0.037]), row(LABELS[2], 0.29), row(LABELS[3], 0.93)]


def printed(rows: Sequence[Row], columns: int | None, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    if columns is None:
        patch.delenv("COLUMNS", raising=False)
    else:
        patch.setenv("COLUMNS", str(columns))
    print_table(rows)
    return capsys.readouterr().out


def cells(text: str) -> list[list[str]]:
    """Cells of all lines of the table's body."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def names(text: str) -> str:
    """The labels, put together again from their lines."""
    return " ".join(" ".join(line[0] for line in cells(text)).split())


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [
        (80, "intervals of vs full, agree, confused, over refusal, strict match, lost, gained, paper %"),
        (100, "confused, over refusal, strict match, lost, gained, paper %"),
        (120, "over refusal, strict match, lost, gained, paper %"),
        (None, ""),
    ],
)
def test_columns_are_left_out_from_the_least_important_one_and_nothing_is_cut(
    columns: int | None, left_out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widest labels take two lines. Without a terminal there are 160 characters."""
    text = printed(ROWS, columns, capsys, monkeypatch)
    assert max(map(cell_len, text.splitlines())) <= (columns or 160)
    assert "…" not in text
    assert names(text) == " ".join(LABELS)
    body = cells(text)
    assert [line[1] for line in body if line[1]] == [
        "1.000 [0.93, 1.00]",
        "0.000 [0.00, 0.04]",
        "0.290 [0.22, 0.33]",
        "0.930 [0.86, 0.97]",
    ]
    differences = ["", "-1.00 [-1.07, -0.93]", "-0.71 [-0.78, -0.64]", "-0.07 [-0.14, +0.00]"]
    assert [line[3] for line in body if line[2]] == [d.split(" ")[0] if columns == 80 else d for d in differences]
    note = " ".join(text[text.rindex("┘") + 1 :].split())
    assert "[ ]: 95 % interval" in note
    assert (f"no room here for {left_out}: see summary.jsonl" in note) == bool(left_out), note
    assert ("agree: share" in note) == ("agree" not in left_out)


def test_no_column_stands_where_a_more_important_one_has_no_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lost` without `gained` beside it would be misread."""
    rows = [row("full", 1.0), row("other", 0.5)]
    whole = cells(printed(rows, 160, capsys, monkeypatch))[1]
    assert len(whole) == 12
    for columns in range(44, 160):
        shown = cells(printed(rows, columns, capsys, monkeypatch))[1]
        assert all(cell.startswith(short) for short, cell in zip(shown, whole, strict=False)), columns


def test_in_a_very_narrow_terminal_there_is_still_the_metric(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(ROWS, 44, capsys, monkeypatch)
    assert max(map(cell_len, text.splitlines())) <= 44
    assert names(text) == " ".join(LABELS)
    assert [line[1] for line in cells(text) if line[1]] == ["1.000", "0.000", "0.290", "0.930"]
    assert "intervals of accuracy, size %, vs full, kl" in " ".join(text.split())


def test_the_title_says_what_was_asked_of_which_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(ROWS, 80, capsys, monkeypatch)
    assert text.splitlines()[0].strip() == "smollm2-recall · linerecall · n = 100 · question visible"


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Markup, markup that ends nothing, and emoji codes, in all that has a name."""
    wild = {"model": "[bold]m[/bold]", "task": "[/]t", "scores": {"accuracy": 1.0, "[red]s": 0.5}}
    rows = [row("full", 1.0, **wild), row("[bold]a[/] :smile: \\[b]", 0.5, **wild)]
    text = printed(rows, 160, capsys, monkeypatch)
    assert "[bold]m[/bold] · [/]t · n = 100" in text
    assert names(text) == "full [bold]a[/] :smile: \\[b]"
    assert "[red]s" in text
    assert "over refusal, [red]s, lost" in " ".join(printed(rows, 60, capsys, monkeypatch).split())


def test_a_divergence_has_no_difference_from_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fidelity run: its rows lack what has no meaning there."""
    rows = [row("full", 0.0), row("a", 0.0461), row("b", 2.345), row("c", 0.0000461)]
    bounds = [[0.0, 0.0], [0.0417, 0.0512], [2.1, 2.6], [0.000038, 0.000052]]
    for one, bound in zip(rows, bounds, strict=True):
        one |= {"metric": "kl", "kl": one["value"], "ci95": bound, "scores": {"kl": one["value"]}, "rates": {}}
        for name in ("difference", "difference_ci95", "lost", "gained"):
            del one[name]
    text = printed(rows, 80, capsys, monkeypatch)
    assert [line[1] for line in cells(text)] == [
        "0.000    [0.00, 0.00]",
        "0.046    [0.042, 0.051]",
        "2.345    [2.10, 2.60]",
        "0.000046 [0.000038, 0.000052]",
    ]
    (head,) = [line for line in text.splitlines() if "policy" in line]
    assert head.strip("┃").replace("┃", " ").split() == ["policy", "kl", "size", "%", "agree", "paper", "%"]


def test_what_a_row_does_not_have_stays_empty(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    poor = row("poor", 0.5, ci95=None, rates={}, scores={"accuracy": 0.5})
    for name in ("difference", "difference_ci95", "kl", "agreement"):
        del poor[name]
    body = cells(printed([row("full", 1.0), row("rich", 0.5), poor], 160, capsys, monkeypatch))
    assert body[2][:8] == ["poor", "0.500", "36.8", "", "", "", "", ""]
    assert "" not in body[1]


def test_a_suite_shows_all_of_its_risks_in_as_many_tables_as_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [f"long_part_{i}" for i in range(9)]
    rows = []
    for label, change in (("full", 0.0), (LABELS[3], -0.125)):
        rates = [{"rates": {"wrong": rate(i / 10, change), "over_refusal": rate(0.25, change)}} for i in range(9)]
        risks = {part: ["wrong", "over_refusal", "not_measured"] for part in parts}
        tiers = {"16": 0.2, "k8v4": 0.5, "0": 0.3}
        rows.append(row(label, 0.5, parts=dict(zip(parts, rates, strict=True)), risks=risks, system_tiers=tiers))
    for columns in (80, 120):
        text = printed(rows, columns, capsys, monkeypatch)
        assert max(map(cell_len, text.splitlines()[:-1])) <= columns
        assert "…" not in text
        tables = text.split("risks of linerecall: rate, and change from full in points")[1:]
        found = [cell for table in tables for cell in cells(table)[0][1:]]
        assert found == [cell for i in range(9) for cell in (f"{i / 10:.2f}", "0.25")]
        assert [cell for table in tables for cell in cells(table)[1][1:]] == [f"{cell} -12" for cell in found]
        assert re.search(r"│ *20 │ *50 │ *30 │", text)


def test_two_digits_are_enough_where_they_tell_the_ends_apart() -> None:
    assert with_intervals(["0.984", "0.50"], [[0.98301, 0.98502], [0.4, 0.6]]) == [
        "0.984 [0.983, 0.985]",
        "0.50  [0.40, 0.60]  ",
    ]
    assert with_intervals(["23.45", ""], [[21.23, 25.67], None]) == ["23.45 [21, 26]", "              "]
    assert with_intervals(["+0.00"], [[-0.004, 0.107]], sign="+") == ["+0.00 [+0.00, +0.11]"]


def test_decimal_points_stand_below_each_other() -> None:
    assert aligned(["4.8", "123", "0.0031", ""]) == ["  4.8   ", "123     ", "  0.0031", "        "]
    assert [two_digits(value) for value in (0, 0.00311, 0.5, 0.999, 4.84, 9.96, 123.4, 3e-8)] == [
        *("0.00", "0.0031", "0.50", "1.00", "4.8", "10", "123", "3.0e-08")
    ]  # fmt: skip
    assert [number(value) for value in (0, 0.0031, 0.00996, 0.5, 1234.5)] == ["0.000", "0.0031", "0.010", "0.500", "1234"]


# --- of a sweep ---


def test_a_sweep_is_one_table_with_a_row_per_job_and_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = SweepFolder(tmp_path / "sweep")
    jobs = [["task=digits", f"policy={p}", f"name=[red]{n}"] for p in ("a", "b") for n in ("x", "y")]
    sweep.plan([], jobs)
    for number_of_job, name in ((0, "first"), (2, "third")):
        run = write_run(tmp_path / name)
        note_outcome(sweep.job(number_of_job), Outcome("finished", "h", 1, 0.0, folder=str(run)))
    note_outcome(sweep.job(1), Outcome("failed", "h", 1, 0.0, "why"))
    for columns in (80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        print_overview(sweep, status(sweep))
        text = capsys.readouterr().out
        assert max(cell_len(line) for line in text.splitlines() if line[:1] in "┏┃┡│├└[") <= columns
        assert text.index("   3  missing") < text.index("┏") < text.index("4 jobs: 2 finished, 1 failed, 1 missing")
        assert "4 jobs · tiny · digits · n = 8 · question visible" in text
        body = cells(text)
        assert [line[0] for line in body if line[0]] == ["0", "1", "2", "3"]
        assert [line[4] for line in body if line[4]] == ["finished", "failed", "finished", "missing"]
        assert " ".join(" ".join(line[1] for line in body).split()) == " ".join(" ".join(job[1:]) for job in jobs)
        values = [(line[2], line[3], line[5]) for line in body if line[3]]
        assert values == 2 * [
            ("full", "0.875 [0.53, 0.98]", "100.0"),
            ("h2o 20%", "0.250 [0.07, 0.59]", "20.0"),
            ("mikv 20% 8/3", "0.750 [0.41, 0.93]", "33.0"),
        ]


def test_jobs_of_different_metrics_say_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.plan([], [["task=a"], ["task=b"]])
    for job, metric in ((0, "accuracy"), (1, "word_perplexity")):
        run = write_run(tmp_path / metric)
        rows = [one | {"metric": metric} for one in read_summary(run)]
        (run / "summary.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        note_outcome(sweep.job(job), Outcome("finished", "h", 1, 0.0, folder=str(run)))
    print_overview(sweep, status(sweep))
    assert [line[3] for line in cells(capsys.readouterr().out)] == [*["accuracy"] * 3, *["word perplexity"] * 3]


def test_there_is_no_table_of_a_sweep_in_which_nothing_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan([], [["a=1"]])
    print_overview(sweep, status(sweep))
    text = capsys.readouterr().out
    assert "1 jobs: 1 missing" in text
    assert "│" not in text


def test_policies_with_other_numbers_of_samples_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in which a later command asked another policy less: one n in the title would be false of the others."""
    text = printed([ROWS[0], row(LABELS[1], 0.5, n=8)], 120, capsys, monkeypatch)
    assert "n = " not in text.splitlines()[0]
    assert [line[2] for line in cells(text)] == ["100", "8"]
