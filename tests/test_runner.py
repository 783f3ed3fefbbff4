"""Runs end to end on the tiny model: records, resuming, memory, identity, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_rows
import pytest
import torch
from conftest import POLICIES, ROOT

from mikv.config import CONF, ConfigError, compose
from mikv.engine import Engine, OutOfMemory
from mikv.records import RecordError, read_environments
from mikv.records.tree import check
from mikv.run import Run
from mikv.runner import RunError, execute
from mikv.work.base import Unit

TINY = ["model=tiny-random", "task.lines=2", "task.limit=4", "batch_size=2", "task.max_new_tokens=6"]


def composed(tmp_path: Path, *overrides: str) -> Run:
    return compose(*TINY, f"out={tmp_path}", *overrides)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    """Samples by key, without what may differ between two runs: time, memory, and how they were computed."""
    found = rows(path)
    assert len({row["key"] for row in found}) == len(found)
    free = {"seconds", "allocated_nbytes", "peak_nbytes", "environment", "batch", "reader", "attention"}
    free |= {"worst_layer", "layer_distance"}
    return {row["key"]: {k: v for k, v in row.items() if k not in free} for row in found}


SAID = ("answer", "correct", "confused", "invented", "score", "answer_tokens", "ended", "kept_tokens", "seen_tokens", "nbytes",
        "full_nbytes", "kl", "agreement", "nll_change")  # fmt: skip
"""What follows from the tokens of an answer."""


def assert_same(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    """The same outcomes up to rounding, which the shape of a batch moves: a code at a tie may flip, and a token of a random
    model with it, seldom. Where rows were mixed up, hardly an answer would be the same."""
    assert one.keys() == other.keys()
    equal = [key for key, row in one.items() if other[key]["answer"] == row["answer"]]
    assert len(equal) >= 0.75 * len(one)
    for key, row in one.items():
        close = {name: pytest.approx(row[name], abs=0.05) for name in ("kl", "agreement", "nll_change") if name in row}
        assert other[key] == row | (close if key in equal else {name: other[key][name] for name in SAID if name in row})


def test_records_and_summary_hold_what_they_promise(tmp_path: Path) -> None:
    execute(composed(tmp_path, "name=here", "panel=demo"))
    samples, summary = rows(tmp_path / "here" / "samples.jsonl"), rows(tmp_path / "here" / "summary.jsonl")
    assert len(samples) == 4 * 13
    assert summary[0]["label"] == "full"
    assert len({row["label"] for row in summary}) == 13
    for field in ("policy", "label", "doc_id", "answer", "target", "correct", "confused", "invented"):
        assert all(field in row for row in samples)
    for row in summary:
        wanted = {
            "policy", "label", "model", "task", "metric", "value", "n", "stderr", "size_percent", "size_percent_paper",
            "nbytes", "seconds", "exercised", "question",
        }  # fmt: skip
        assert wanted <= row.keys()
        assert row["n"] == 4
        assert row["seconds"]["prefill"] > 0
        assert row["exercised"] == (0 if row["policy"] == "full" else 4)
        mine = [s for s in samples if s["label"] == row["label"]]
        counted = sum(sum(s["nbytes"].values()) for s in mine) / sum(s["full_nbytes"] for s in mine)
        assert row["size_percent"] == pytest.approx(100 * counted)
    assert {f.name for f in (tmp_path / "here").iterdir()} >= {"config.yaml", "run.json", "curve.png"}


def test_groups_that_no_head_can_be_cut_into_are_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mikv.runner.load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match="group=12 does not divide head_dim=16"):
        execute(composed(tmp_path, "policy.low.group=12"))


def test_the_same_command_again_computes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = execute(composed(tmp_path))
    monkeypatch.setattr(Engine, "generate", lambda *_: pytest.fail("computed again"))
    assert execute(composed(tmp_path)) == first
    assert "all 4 samples are done already" in capsys.readouterr().out


def test_a_larger_limit_and_another_panel_go_on_in_a_named_folder(tmp_path: Path) -> None:
    execute(composed(tmp_path, "name=x"))
    before = outcomes(tmp_path / "x" / "samples.jsonl")
    execute(composed(tmp_path, "name=x", "task.limit=6", "panel=demo"))
    after = outcomes(tmp_path / "x" / "samples.jsonl")
    assert len(after) == 6 * 13
    assert_same(before, {key: after[key] for key in before})


def test_kernels_answer_a_run_and_are_in_its_key(tmp_path: Path) -> None:
    """Rounded otherwise, so records of their own; a trained model's answers are the same, a random one's nearly."""
    one, two, three = (composed(tmp_path, *options) for options in ([], ["reader=kernel"], ["attention=reference"]))
    assert len({run.key(run.panel[1], Unit(0)) for run in (one, two, three)}) == 3
    assert [run.identity["protocol"].get("attention") for run in (one, two, three)] == [None, "cpu", "reference"]
    first, second = execute(one), execute(two)
    assert [row["label"] for row in first] == [row["label"] for row in second]
    for a, b in zip(first, second, strict=True):
        assert abs(a["kl"] - b["kl"]) < 1e-3
        assert a["nbytes"] == b["nbytes"]
    assert {row["reader"] for row in rows(two.folder() / "samples.jsonl")} == {"kernel"}


@pytest.mark.parametrize("options", ["batch_size=1", "batch_size=3", "reader=packed", "panel=demo"])
def test_batch_reader_and_panel_change_outcomes_by_rounding_alone(tmp_path: Path, options: str) -> None:
    execute(composed(tmp_path, "name=a"))
    execute(composed(tmp_path, "name=b", options))
    first, second = (outcomes(tmp_path / name / "samples.jsonl") for name in "ab")
    assert_same(first, {key: second[key] for key in first})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("MPS backend out of memory")])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    execute(composed(tmp_path, "name=roomy", "batch_size=4"))
    generate = Engine.generate

    def narrow(self: Engine, prompts: Any, *rest: Any) -> Any:
        if len(prompts) > 1:
            raise error
        return generate(self, prompts, *rest)

    monkeypatch.setattr(Engine, "generate", narrow)
    execute(composed(tmp_path, "name=narrow", "batch_size=4"))
    assert_same(outcomes(tmp_path / "roomy" / "samples.jsonl"), outcomes(tmp_path / "narrow" / "samples.jsonl"))
    assert "out of memory with 4 prompts at a time; going on with at most 2" in capsys.readouterr().out


def test_out_of_memory_with_one_sample_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, calls = Engine.generate, []

    def failing(self: Engine, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return generate(self, *arguments)

    monkeypatch.setattr(Engine, "generate", failing)
    with pytest.raises(OutOfMemory, match=r"single prompt .* reader=packed"):
        execute(composed(tmp_path, "name=x", "batch_size=1"))
    assert len(rows(tmp_path / "x" / "samples.jsonl")) == 2 * 2


def test_another_error_is_not_taken_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Engine, "generate", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        execute(composed(tmp_path))


def test_a_policy_that_never_compressed_fails_the_run(tmp_path: Path) -> None:
    """Its numbers would be the full cache's (trap T4)."""
    with pytest.raises(RunError, match=r"mikv 100% 16/2 was never exercised"):
        execute(composed(tmp_path, "policy=mikv", "policy.keep=1.0"))


def test_a_prompt_longer_than_the_model_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"4 of 4 samples can't be asked of tiny-random: .*task\.lines"):
        execute(composed(tmp_path, "model.max_tokens=50", "name=x"))
    assert not (tmp_path / "x" / "samples.jsonl").exists()


def test_a_corrupt_record_is_reported_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(composed(tmp_path, "name=x"))
    file = tmp_path / "x" / "samples.jsonl"
    file.write_text("nonsense\n" + file.read_text())
    monkeypatch.setattr("mikv.runner.load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RecordError, match=r"samples\.jsonl:1 is no record"):
        execute(composed(tmp_path, "name=x"))


def test_the_question_is_part_of_every_row(tmp_path: Path) -> None:
    """Visible and hidden are never mixed (trap T5): another key, another folder, and a field in every row."""
    for question in ("visible", "hidden"):
        for row in execute(composed(tmp_path, "task=guardedrecall", f"protocol.question={question}")):
            assert row["question"] == question
    files = list(tmp_path.glob("*/samples.jsonl"))
    assert len(files) == 2
    assert not outcomes(files[0]).keys() & outcomes(files[1]).keys()


@pytest.mark.parametrize(
    "override",
    [
        "policy.keep=0.3", "policy.high.bits=8", "policy.low.key_bits=4", "policy.low.group=8", "policy.balance=false",
        "policy.recent=0.2", "policy.budget=fixed", "policy=h2o", "policy=random", "task.lines=3", "task.max_new_tokens=7",
        "task=guardedrecall", "protocol.question=hidden", "fidelity=false", "seed=1", "model.dtype=bfloat16",
        "model=smollm2-135m",
    ],
)  # fmt: skip
def test_two_runs_that_differ_in_one_field_have_two_keys(tmp_path: Path, override: str) -> None:
    """And nothing else: a store that hashes less returns another policy's answers (trap T29)."""
    one, other = composed(tmp_path), composed(tmp_path, override)
    assert one.key(one.panel[1], Unit(0)) != other.key(other.panel[1], Unit(0))
    assert one.folder() != other.folder()


@pytest.mark.parametrize(
    "override", ["batch_size=7", "reader=packed", "out=elsewhere", "launcher=slurm", "model.device_map=auto"]
)
def test_what_changes_no_outcome_changes_no_key(tmp_path: Path, override: str) -> None:
    one, other = composed(tmp_path), composed(tmp_path, override)
    assert one.key(one.panel[1], Unit(0)) == other.key(other.panel[1], Unit(0))


def test_a_file_is_known_by_its_content_not_its_place(tmp_path: Path) -> None:
    line = "line a-b: REGISTER_CONTENT is <7>\n\nNow the record is over. Tell me what is in line a-b?"
    for name in ("one", "two", "other"):
        text = line.replace("<7>", "<8>") if name == "other" else line
        (tmp_path / name).write_text(json.dumps({"prompt": text, "key": "a-b", "target": 7}))
    one, two, other = (composed(tmp_path, f"task.file={tmp_path / name}").identity for name in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention=triton"], "model.dtype=bfloat16 or attention=reference"),
        (["attention=reference", "reader=packed"], "reader=packed uses none; choose reader=kernel"),
        (["panel=demo", "panel.entries=[{policy: mikv}, {policy: mikv}]"], "more than once"),
    ],
)
def test_what_can_not_go_together_is_refused_with_a_reason(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        composed(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (f.parent.name, f.stem)
        for f in sorted(CONF.glob("*/[!_]*.yaml"))
        if f.parent.name != "model" and (f.parent.name != "policy" or f.stem in POLICIES)
    ],
)
def test_every_committed_choice_builds(tmp_path: Path, group: str, name: str) -> None:
    more = ["task.name=hellaswag"] if name == "lm_eval" else []
    assert compose("model=tiny-random", f"{group}={name}", f"out={tmp_path}", *more).panel[0].name == "full"


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "model").glob("*.yaml")))
def test_every_model_choice_builds(tmp_path: Path, name: str) -> None:
    spec = composed(tmp_path, f"model={name}").model
    assert spec.name == name
    assert not spec.trust_remote_code


def test_a_sweep_runs_its_jobs_one_after_the_other(tmp_path: Path) -> None:
    sweep = ["-m", "policy=mikv,h2o", *TINY, f"out={tmp_path}"]
    done = subprocess.run([sys.executable, "run.py", *sweep], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/summary.jsonl"))) == 2


# but for the one that runs in an environment of its own
SCRIPTS = sorted(set((ROOT / "scripts").glob("*.py")) - {ROOT / "scripts" / "kvpress_side.py"})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_starts_as_its_docstring_says(script: Path, tmp_path: Path) -> None:
    """From another folder and without PYTHONPATH, as a user would."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


# --- a name loses nothing ---


def test_a_smaller_limit_or_another_policy_keeps_what_the_summary_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary is of all that the folder holds, and the run says so."""
    execute(composed(tmp_path, "name=x", "task.limit=6", "policy=h2o"))
    assert "note: the summary is of all" not in capsys.readouterr().out
    first = {row["label"]: row for row in rows(tmp_path / "x" / "summary.jsonl")}
    again = execute(composed(tmp_path, "name=x", "task.limit=2", "policy=mikv"))
    said = capsys.readouterr().out
    assert (
        "note: the summary is of all that the folder holds (3 policies, 6 samples); this command asked for 2 and 2 of them"
        in said
    )
    after = {row["label"]: row for row in rows(tmp_path / "x" / "summary.jsonl")}
    assert [row["samples"] for row in after.values()] == [6, 2, 6]
    assert list(after) == ["full", "mikv 20% 16/2", "h2o 20%"] == [row["label"] for row in again]
    assert after["full"] == first["full"]
    assert after["h2o 20%"] == first["h2o 20%"]
    assert check(tmp_path / "x") == []


def test_records_of_a_sample_that_has_changed_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gold answers that were corrected: the old outcome stays in the file and out of the summary, and so do samples of which
    nobody knows whether they have changed."""
    data = Path(own_rows.write(tmp_path / "data"))
    base = [
        "model=tiny-random",
        "task=context_qa",
        f"task.data_dir={data}",
        "task.max_new_tokens=4",
        f"out={tmp_path}",
        "name=x",
    ]
    execute(compose(*base, "task.limit=4"))
    name = "xquad_en/xquad_en.jsonl"
    corrected = [row | {"answers": {"text": ["corrected"], "answer_start": [0]}} for row in own_rows.ROWS[name]]
    own_rows.write(data, {name: corrected})
    execute(compose(*base, "task.limit=2"))
    assert (
        "note: 8 records in the folder are of samples with other content than now, and don't count" in capsys.readouterr().out
    )
    summary = rows(tmp_path / "x" / "summary.jsonl")
    assert [row["samples"] for row in summary] == [2, 2]
    targets = {row["target"] for row in rows(tmp_path / "x" / "samples.jsonl")}
    assert "corrected" in targets
    assert len(targets) > 1


def test_tasks_that_a_command_leaves_out_are_not_lost_from_a_summary(tmp_path: Path) -> None:
    data = own_rows.write(tmp_path / "data")
    base = ["model=tiny-random", "task=contextloss", f"task.data_dir={data}", "task.limit=2", f"out={tmp_path}", "name=x"]
    parts = [f"~task.parts.lines_{n}" for n in (20, 40, 80)]
    short = [f"task.parts.{part}.max_new_tokens=3" for part in ("lines_10", "niah_multikey", "key_value")]
    execute(compose(*base, *parts, *short))
    before = (tmp_path / "x" / "summary.jsonl").read_bytes()
    with pytest.raises(RecordError, match="holds samples of niah_multikey, which this command leaves out"):
        execute(compose(*base, *parts, *short[::2], "~task.parts.niah_multikey"))
    assert (tmp_path / "x" / "summary.jsonl").read_bytes() == before


def test_two_policies_of_one_label_are_told_apart(tmp_path: Path) -> None:
    """A policy of one's own whose label leaves something out: neither summary nor flips could tell whose a row is."""
    run = composed(tmp_path, "name=x")
    execute(run)
    alike = replace(run.panel[1], recent=0.1)
    with pytest.raises(RecordError, match="another policy that is called 'mikv 20% 16/2', too"):
        execute(replace(run, panel=(run.panel[0], alike)))


def test_a_finished_run_is_shown_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder that is read-only; root may write anywhere, so that nothing is opened for writing is what is asked. Also
    where another command has added a policy since: its summary has the same rows in another order."""
    execute(composed(tmp_path, "name=x"))
    execute(composed(tmp_path, "name=x", "policy=h2o"))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "x").iterdir()}
    capsys.readouterr()
    monkeypatch.setattr("mikv.runner.RunFolder", lambda *_, **__: pytest.fail("claimed"))
    monkeypatch.setattr("mikv.plots.curve.save_curve", lambda *_, **__: pytest.fail("drawn"))
    assert [row["label"] for row in execute(composed(tmp_path, "name=x"))] == ["full", "mikv 20% 16/2", "h2o 20%"]
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "x").iterdir()} == before
    said = capsys.readouterr().out
    assert "all 4 samples are done already" in said
    assert "mikv 20% 16/2" in said


def test_a_plot_that_can_not_be_drawn_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run in a read-only folder without its plot."""
    execute(composed(tmp_path, "name=x"))
    (tmp_path / "x" / "curve.png").unlink()

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mikv.plots.curve.save_curve", refused)
    capsys.readouterr()
    execute(composed(tmp_path, "name=x"))
    assert "curve.png can't be drawn (Permission denied)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "task",
    [
        ["task=guardedrecall", "task.lines=2"],
        ["task=fidelity", "task.context=100", "task.tail=20"],
        ["task=hallucination", "~task.parts.truthfulqa", "task.data_dir=DATA"],
        ["task=memo_trap", "task.data_dir=DATA"],
    ],
    ids=lambda task: task[0],
)
def test_what_a_run_wrote_is_what_it_counted(task: list[str], tmp_path: Path) -> None:
    data = own_rows.write(tmp_path / "data")
    lines = [line.replace("DATA", data) for line in task]
    run = compose("model=tiny-random", *lines, "task.limit=3", f"out={tmp_path}", "name=x")
    summary = execute(run)
    assert check(tmp_path / "x") == []
    assert {"reader", "attention", "batch_size", "environment"} <= summary[0].keys()
    assert summary[0]["reader"] == ["working"]
    for row in rows(tmp_path / "x" / "samples.jsonl"):
        assert row["allocated_nbytes"] >= sum(row["nbytes"].values())
        assert row["peak_nbytes"] > 10**7
        assert row["batch"][1] == 2
        assert row["environment"] in read_environments(tmp_path / "x")
