"""python -m mikv.records: list, filter, export, merge, check."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import written_run
from conftest import ROOT

from mikv.fingerprint import record_key
from mikv.records import VERSION, RunFolder, read_environments, read_rows
from mikv.records.__main__ import main

Row = dict[str, Any]


def identity(seed: int = 0) -> Row:
    named = {"model": {"name": "tiny"}, "task": {"name": "digits"}, "protocol": {"question": "visible"}}
    return {**named, "seed": seed}


def key(doc_id: int, seed: int = 0) -> str:
    return record_key(identity(seed), "p", {"doc_id": doc_id})


def row(doc_id: int, seed: int = 0, **more: Any) -> Row:
    """A line of samples.jsonl of the full cache."""
    one = written_run.samples({("full", "full"): "0123456789"})[doc_id]
    batch = {"batch": [4, 2], "reader": "working", "attention": "torch"}
    return one | {"key": key(doc_id, seed), "policy_id": "p", "doc_id": doc_id, "kl": 0.5, **batch, **more}


def write(
    folder: Path,
    *rows: Row,
    seed: int = 0,
    finished: bool = True,
    commit: str = "1" * 40,
    device: str = "cpu",
    monkeypatch: Any = None,
) -> Path:
    """A run; commit: of the process that made it (with monkeypatch)."""
    if monkeypatch is not None:
        monkeypatch.setattr("mikv.records.folder.environment", lambda: {"git_commit": commit})
    with RunFolder(folder, identity(seed), "a: 1\n", device=device) as run:
        kept = run.append(rows)
        if finished:
            run.write_summary(written_run.summary(kept))
    return folder


def test_list_shows_finished_and_unfinished_runs_and_filters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", *map(row, range(3)), monkeypatch=monkeypatch)
    write(tmp_path / "one", row(3), commit="2" * 40, monkeypatch=monkeypatch)
    write(tmp_path / "deep" / "two", *map(row, range(2)), finished=False)
    (tmp_path / ".sweeps").mkdir()
    write(tmp_path / ".sweeps" / "hidden", row(0))
    assert main(["list", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["one", "full", "accuracy", "1", "n", "1", "size", "%", "100.0"]
    assert told[1].strip().startswith("commit 11111111 and 22222222, torch")
    assert told[2].split() == ["deep/two", "unfinished,", "2", "samples"]
    assert told[3] == "1 finished runs, 1 rows; 1 unfinished in the tree"
    assert main(["list", str(tmp_path), "--where", "model=other"]) == 0
    assert capsys.readouterr().out.startswith("0 finished runs")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_export_makes_a_table_of_samples_or_summaries(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "one", *map(row, range(3)))
    write(tmp_path / "two", *(row(i, seed=1) for i in range(2)), seed=1)
    read = pandas.read_csv if kind == "csv" else pandas.read_parquet
    assert main(["export", str(tmp_path), str(tmp_path / f"s.{kind}"), "--samples", "--where", "run=two"]) == 0
    samples = read(tmp_path / f"s.{kind}")
    assert list(samples["key"]) == [key(0, 1), key(1, 1)]
    assert list(samples["seconds.decode"]) == [0.25, 0.25]
    assert main(["export", str(tmp_path), str(tmp_path / f"r.{kind}")]) == 0
    assert list(read(tmp_path / f"r.{kind}")["n"]) == [3, 2]


def test_merge_copies_new_runs_and_adds_missing_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(here / "both", row(0), row(1), monkeypatch=monkeypatch)
    write(there / "both", row(1), row(2), row(3), commit="2" * 40, monkeypatch=monkeypatch)
    write(there / "new", row(0, seed=1), seed=1)
    assert main(["merge", str(there), str(here)]) == 0
    assert "both: 2 samples added, run its command again" in capsys.readouterr().out
    merged = list(read_rows(here / "both" / "samples.jsonl"))
    assert [one["key"] for one in merged] == [key(i) for i in range(4)]
    commits = {name: of["git_commit"][0] for name, of in read_environments(here / "both").items()}
    assert [commits[one["environment"]] for one in merged] == ["1", "1", "2", "2"]
    assert not (here / "both" / "summary.jsonl").exists()  # it counted two
    assert [one["key"] for one in read_rows(here / "new" / "samples.jsonl")] == [key(0, 1)]
    assert main(["merge", str(there), str(here)]) == 0
    assert "both: nothing new\nnew: nothing new\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seed", "answer", "message"), [(1, "same", "holds the records of another run"), (0, "other", "two outcomes for")]
)
def test_merge_refuses_what_contradicts(
    seed: int, answer: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "here" / "run", row(0, answer="same"))
    write(tmp_path / "there" / "run", row(0, seed, answer=answer), row(1, seed), seed=seed)
    before = (tmp_path / "here" / "run" / "samples.jsonl").read_bytes()
    assert main(["merge", str(tmp_path / "there"), str(tmp_path / "here")]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "here" / "run" / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "other",
    [{"batch": [1, 2]}, {"reader": "packed"}, {"commit": "2" * 40}, {"device": "NVIDIA H100"}],
    ids=["batch", "reader", "code", "device"],
)
def test_merge_takes_what_another_batch_or_machine_rounded_otherwise(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code at a tie flips, and an answer with it: no contradiction, and what is there stays."""
    commit, device = other.pop("commit", "1" * 40), other.pop("device", "cpu")
    write(tmp_path / "here" / "run", row(0), monkeypatch=monkeypatch)
    flipped = row(0, answer="7", score=0.0, correct=False, **other)
    write(tmp_path / "there" / "run", flipped, row(1), commit=commit, device=device, monkeypatch=monkeypatch)
    assert main(["merge", str(tmp_path / "there"), str(tmp_path / "here")]) == 0
    told = capsys.readouterr().out
    assert "1 samples added" in told
    assert "1 were computed otherwise (batch, machine or code) and differ: the ones there stay" in told
    assert [one["answer"] for one in read_rows(tmp_path / "here" / "run" / "samples.jsonl")] == ["0", "1"]


def lines(*rows: Row) -> str:
    return "".join(json.dumps({"version": VERSION, **one}) + "\n" for one in rows)


A, B = row(0), row(1)


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (lines(A, B), 0, "1 runs, 0 problems, 0 notes"),
        (lines(A, B) + '{"torn', 0, "note  run: .*the last line was cut off"),
        (lines(A, B, A | {"kl": 0.5001, "seconds": {"decode": 9}}), 0, "note  run: .* is there twice, alike"),
        (lines(A, B, A | {"kl": 0.6, "batch": [1, 1]}), 0, "note  run: .* is there twice, computed under other circumstances"),
        (lines(A, B, A | {"kl": 0.6}), 1, "WRONG run: .* is there twice, two outcomes"),
        (lines(A) + "garbage\n" + lines(B), 1, r"WRONG run: .*samples\.jsonl:2 is no record"),
        (lines(A, B | {"version": VERSION + 1}), 1, f"WRONG run: .*records of version {VERSION + 1}"),
        (lines(A), 1, "WRONG run: the summary counts 2 samples of full, and 1 are there"),
        (lines(A, B, row(2)), 1, "WRONG run: the summary counts 2 samples of full, and 3 are there"),
        (lines(A, B | {"score": 0.0}), 1, "WRONG run: full: the summary says value = 1.0, its samples 0.5"),
        (lines(A, B | {"invented": True}), 1, "WRONG run: full: the summary says rates = "),
        (lines(A, B | {"nbytes": {"raw": 900}}), 1, "WRONG run: full: the summary says size_percent = 100.0, its samples 95.0"),
        (lines(A, B | {"doc_id": 7}), 1, "WRONG run: 1 samples are not of this run: .* is not the key of what"),
        (lines(A, row(1, seed=5)), 1, "WRONG run: 1 samples are not of this run"),
        (lines(A, B | {"environment": "zzz"}), 1, "WRONG run: rows name environments that are not noted: zzz"),
        (lines(A, B, row(2, label="h2o", policy_id="q", key=record_key(identity(), "q", {"doc_id": 2}))), 1,
         "WRONG run: 1 samples of h2o, of which the summary says nothing"),
    ],
    ids=["whole", "torn", "twice", "rounded", "contradiction", "garbage", "version", "lost", "more", "score", "flag", "bytes",
         "doc", "foreign", "environment", "policy"],
)  # fmt: skip
def test_check_finds_what_is_wrong(
    text: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a hand has edited: scores in the samples that are not those of the summary."""
    write(tmp_path / "run", A, B)
    (name,) = read_environments(tmp_path / "run")
    text = "".join(
        json.dumps({"environment": name} | json.loads(line)) + "\n" if line.endswith("}\n") else line
        for line in text.splitlines(keepends=True)
    )
    (tmp_path / "run" / "samples.jsonl").write_text(text)
    assert main(["check", str(tmp_path)]) == status
    told = capsys.readouterr().out.replace("\n", " ")
    assert re.search(message, told), told
    assert (tmp_path / "run" / "samples.jsonl").read_text() == text


def test_check_finds_a_summary_that_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = write(tmp_path / "run", A, B) / "summary.jsonl"
    summary.write_text(summary.read_text().replace('"value": 1.0', '"value": 0.9', 1))
    assert main(["check", str(tmp_path)]) == 1
    assert "full: the summary says value = 0.9, its samples 1.0" in capsys.readouterr().out


UNCHECKED = ("metric",)  # of a summary: its name stands in no sample


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers, texts and Nones in an object."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for name, one in items for leaf in leaves(one, (*path, name))]
    return [path]


def edited(value: Any, path: tuple[Any, ...]) -> Any:
    """With another value at the path."""
    if not path:
        return not value if isinstance(value, bool) else 2 * value + 1 if isinstance(value, int | float) else f"{value}x"
    changed = copy.deepcopy(value)
    changed[path[0]] = edited(value[path[0]], path[1:])
    return changed


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    """A run of three policies that check finds nothing wrong with."""
    folder = tmp_path / "tree" / "run"
    with RunFolder(folder, identity(), "a: 1\n") as run:
        rows = [one | {"policy_id": one["policy"], "doc_id": int(one["sample"])} for one in written_run.samples()]
        kept = run.append([one | {"key": record_key(identity(), one["policy_id"], one)} for one in rows])
        run.write_summary(written_run.summary(kept))
    assert main(["check", str(folder.parent)]) == 0
    return folder


def test_check_sees_every_number_of_a_summary_that_was_edited(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = whole_run / "summary.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    paths = [path for path in leaves(rows[1]) if path[0] not in UNCHECKED]
    assert len(paths) > 50
    for path in paths:
        file.write_text("".join(json.dumps(one) + "\n" for one in [rows[0], edited(rows[1], path), rows[2]]))
        assert main(["check", str(whole_run.parent)]) == 1, path
    capsys.readouterr()


@pytest.mark.parametrize("name", ["summary.jsonl", "samples.jsonl"])
def test_check_says_where_a_field_is_missing_and_goes_on(
    name: str, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole_run, whole_run.parent / "zz")
    file = whole_run / name
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    optional = {"version", "by_task", "ended", "correct", "answer", "target", "size_percent_paper"}
    for field in rows[1].keys() - optional:
        lacking = [{of: one for of, one in row.items() if of != field} for row in rows[1:2]]
        file.write_text("".join(json.dumps(one) + "\n" for one in [rows[0], *lacking, *rows[2:]]))
        assert main(["check", str(whole_run.parent)]) == 1, field
        told = capsys.readouterr().out
        assert "WRONG run: " in told, field
        assert "2 runs" in told, field


@pytest.mark.parametrize("name", ["correct", "score", "model", "task", "question", "label", "policy"])
def test_check_sees_a_sample_that_was_edited(name: str, whole_run: Path) -> None:
    file = whole_run / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[9] = json.dumps(edited(json.loads(lines[9]), (name,))) + "\n"
    file.write_text("".join(lines))
    assert main(["check", str(whole_run.parent)]) == 1


def test_check_counts_the_last_record_of_a_sample_whose_content_has_changed(
    whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((whole_run / "samples.jsonl").read_text().splitlines()[8])
    with RunFolder(whole_run, identity(), "a: 1\n") as run:
        changed = before | {"asked": "other gold", "score": 0.0, "correct": False}
        run.append([changed | {"key": record_key(identity(), before["policy_id"], changed)}])
        last = {(one["label"], one["sample"]): one for one in run.samples().values()}
        run.write_summary(written_run.summary(list(last.values())))
    assert main(["check", str(whole_run.parent)]) == 0
    assert "0 problems, 0 notes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other", [{"target": "7"}, {"prompt_tokens": 3}, {"label": "else"}, {"cut_tokens": 5}], ids=lambda of: next(iter(of))
)
def test_merge_takes_no_contradiction_for_rounding(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is known before anything is computed is moved by no batch."""
    write(tmp_path / "here" / "run", row(0))
    write(tmp_path / "there" / "run", row(0, batch=[1, 2], **other))
    assert main(["merge", str(tmp_path / "there"), str(tmp_path / "here")]) == 2
    assert "two outcomes for" in capsys.readouterr().err


def test_check_finds_damaged_files_and_unfinished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write(tmp_path / "one", row(0)) / "run.json").write_text("{")
    (write(tmp_path / "two", row(0)) / "summary.jsonl").write_text('{"half')
    (write(tmp_path / "three", row(0)) / "environments.jsonl").write_text("nonsense")
    write(tmp_path / "unfinished", row(0), finished=False)
    assert main(["check", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "run.json is damaged" in told
    assert "summary.jsonl is damaged" in told
    assert "environments.jsonl is damaged" in told
    assert "note  unfinished: unfinished: 1 samples and no summary" in told
    assert main(["check", str(tmp_path / "nowhere")]) == 2


def remove_a_flip(file: Path) -> None:
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if '"label": "h2o' not in line))


def swap_an_outcome(file: Path) -> None:
    file.write_text(
        file.read_text().replace('"answer": "9", "target": "1", "score": 0.0', '"answer": "9", "target": "1", "score": 1.0')
    )


@pytest.mark.parametrize(("harm", "status"), [(lambda _: None, 0), (remove_a_flip, 1), (swap_an_outcome, 1)])
def test_check_counts_the_flips_of_a_kept_result_set(
    harm: Callable[[Path], None], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import keep_results

    written_run.write_run(tmp_path / "run")
    assert keep_results.main([str(tmp_path / "run"), "--into", str(tmp_path / "kept")]) == 0
    harm(tmp_path / "kept" / "run" / "samples.jsonl")
    assert main(["check", str(tmp_path / "kept")]) == status
    assert ("WRONG run: the summary counts 6 lost and 1 gained samples of h2o 20%" in capsys.readouterr().out) == bool(status)


def test_check_sees_a_kept_summary_that_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its samples are not there: it is compared with what was kept."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import keep_results

    written_run.write_run(tmp_path / "run")
    assert keep_results.main([str(tmp_path / "run"), "--into", str(tmp_path / "kept"), "--summaries"]) == 0
    assert main(["check", str(tmp_path / "kept")]) == 0
    summary = tmp_path / "kept" / "run" / "summary.jsonl"
    summary.write_text(summary.read_text().replace('"size_percent": 20.0', '"size_percent": 10.0'))
    assert main(["check", str(tmp_path / "kept")]) == 1
    assert "WRONG run: summary.jsonl is not as it was kept" in capsys.readouterr().out
