"""python -m mikv.records: list, filter, export, merge, check."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest

from mikv.records import VERSION, RunFolder, read_rows
from mikv.records.__main__ import main


def write(folder: Path, keys: str, *, seed: int = 0, finished: bool = True, **more: Any) -> Path:
    with RunFolder(folder, {"seed": seed}, "a: 1\n") as run:
        run.append([{"key": key, "label": "full", "kl": 0.5, "seconds": {"decode": 0.1}, **more} for key in keys])
        if finished:
            summary = {"label": "full", "model": "tiny", "task": "t", "metric": "accuracy", "value": 0.5, "ci95": [0.1, 0.9]}
            run.write_summary([summary | {"n": len(keys), "samples": len(keys), "size_percent": 100.0}])
    return folder


def test_list_shows_finished_and_unfinished_runs_and_filters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one", "abc")
    write(tmp_path / "deep" / "two", "ab", finished=False)
    (tmp_path / ".sweeps").mkdir()
    write(tmp_path / ".sweeps" / "hidden", "a")
    assert main(["list", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["one", "full", "accuracy", "0.5", "n", "3", "size", "%", "100.0"]
    assert told[1].split() == ["deep/two", "unfinished,", "2", "samples"]
    assert told[2] == "1 finished runs, 1 rows; 1 unfinished in the tree"
    assert main(["list", str(tmp_path), "--where", "model=other"]) == 0
    assert capsys.readouterr().out.startswith("0 finished runs")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_export_makes_a_table_of_samples_or_summaries(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "one", "abc")
    write(tmp_path / "two", "de", seed=1)
    read = pandas.read_csv if kind == "csv" else pandas.read_parquet
    assert main(["export", str(tmp_path), str(tmp_path / f"s.{kind}"), "--samples", "--where", "run=two"]) == 0
    samples = read(tmp_path / f"s.{kind}")
    assert list(samples["key"]) == ["d", "e"]
    assert list(samples["seconds.decode"]) == [0.1, 0.1]
    assert main(["export", str(tmp_path), str(tmp_path / f"r.{kind}")]) == 0
    assert list(read(tmp_path / f"r.{kind}")["n"]) == [3, 2]


def test_merge_copies_new_runs_and_adds_missing_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(here / "both", "ab")
    write(there / "both", "bcd")
    write(there / "new", "x", seed=1)
    assert main(["merge", str(there), str(here)]) == 0
    assert "both: 2 samples added; run its command again" in capsys.readouterr().out
    assert [row["key"] for row in read_rows(here / "both" / "samples.jsonl")] == ["a", "b", "c", "d"]
    assert not (here / "both" / "summary.jsonl").exists()  # it counted two
    assert [row["key"] for row in read_rows(here / "new" / "samples.jsonl")] == ["x"]
    assert main(["merge", str(there), str(here)]) == 0
    assert "both: nothing new\nnew: nothing new\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seed", "answer", "message"), [(1, "same", "holds the records of another run"), (0, "other", "two outcomes for a")]
)
def test_merge_refuses_what_contradicts(
    seed: int, answer: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "here" / "run", "a", answer="same")
    write(tmp_path / "there" / "run", "ab", seed=seed, answer=answer)
    before = (tmp_path / "here" / "run" / "samples.jsonl").read_bytes()
    assert main(["merge", str(tmp_path / "there"), str(tmp_path / "here")]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "here" / "run" / "samples.jsonl").read_bytes() == before


def line(key: str, **more: Any) -> str:
    return json.dumps({"version": VERSION, "key": key, "label": "full", "kl": 0.5, **more}) + "\n"


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (line("a") + line("b"), 0, "1 runs, 0 problems, 0 notes"),
        (line("a") + line("b") + '{"torn', 0, "note  run: .*the last line was cut off"),
        (line("a") + line("b") + line("a", kl=0.5001, seconds={"decode": 9}), 0, "note  run: a is there twice, alike"),
        (line("a") + line("b") + line("a", kl=0.6), 1, "WRONG run: a is there twice, with two outcomes"),
        (line("a") + "garbage\n" + line("b"), 1, r"WRONG run: .*samples\.jsonl:2 is no record"),
        (line("a") + line("b", version=VERSION + 1), 1, f"WRONG run: .*records of version {VERSION + 1}"),
        (line("a"), 1, "WRONG run: the summary counts 2 samples of full, and 1 are there"),
    ],
    ids=["whole", "torn", "twice", "contradiction", "garbage", "version", "lost"],
)
def test_check_finds_what_is_wrong(
    text: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", "ab")
    (tmp_path / "run" / "samples.jsonl").write_text(text)
    assert main(["check", str(tmp_path)]) == status
    told = capsys.readouterr().out.replace("\n", " ")
    assert re.search(message, told), told
    assert (tmp_path / "run" / "samples.jsonl").read_text() == text


def test_check_finds_damaged_files_and_unfinished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write(tmp_path / "one", "a") / "run.json").write_text("{")
    (write(tmp_path / "two", "a") / "summary.jsonl").write_text('{"half')
    write(tmp_path / "unfinished", "a", finished=False)
    assert main(["check", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "run.json is damaged" in told
    assert "summary.jsonl is damaged" in told
    assert "note  unfinished: unfinished: 1 samples and no summary" in told
    assert main(["check", str(tmp_path / "nowhere")]) == 2
