"""The notebooks run as they are on what is committed, and show something; results are kept small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from written_run import divergences, read_summary, write_run

from mikv.results import flips, frame, read_results

RESULTS = ROOT / "results"


def executed(name: str) -> list[Any]:
    """Outputs of a notebook, run where it lies."""
    notebook = nbformat.read(RESULTS / name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(RESULTS)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def images(outputs: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def text(outputs: list[Any]) -> str:
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_curves_run_on_the_committed_results() -> None:
    outputs = executed("curves.ipynb")
    assert images(outputs) == 2
    assert "smollm2-recall" in text(outputs)


def test_curves_run_on_any_other_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of outcomes and one of divergences, of which no difference is to be told."""
    write_run(tmp_path / "digits")
    write_run(tmp_path / "texts", divergences())
    monkeypatch.setenv("MIKV_RESULTS", str(tmp_path))
    outputs = executed("curves.ipynb")
    assert images(outputs) == 2
    (changes,) = [shown for output in outputs if "mcnemar_p" in (shown := text([output]))]
    assert "digits h2o 20%" in " ".join(changes.split())
    assert "texts" not in changes


def test_inside_runs_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIKV_MODEL", "tiny-random")
    monkeypatch.setenv("MIKV_LINES", "2")
    outputs = executed("inside.ipynb")
    assert images(outputs) == 5
    assert "tiny-random: " in text(outputs)


def test_risks_run_on_the_committed_results() -> None:
    outputs = executed("risks.ipynb")
    assert images(outputs) >= 1
    assert "breach" in text(outputs)


@pytest.mark.parametrize("name", ["curves.ipynb", "inside.ipynb", "risks.ipynb"])
def test_committed_notebooks_show_their_figures_and_no_machine(name: str) -> None:
    raw = (RESULTS / name).read_text(encoding="utf-8")
    outputs = [output for cell in nbformat.reads(raw, as_version=4).cells for output in cell.get("outputs", [])]
    assert images(outputs) > 0
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for private in (str(ROOT), str(Path.home()), "/tmp/"):
        assert private not in raw
    assert len(raw) < 1_000_000


def test_committed_results_are_small_and_readable() -> None:
    folders = sorted(file.parent for file in (RESULTS / "reference").glob("*/summary.jsonl"))
    assert folders
    for folder in folders:
        results = read_results(folder)
        assert results.summary[0]["policy"] == "full"
        if not results.samples:  # kept without, see scripts/keep_results.py
            continue
        pairs = list(flips(results))
        labels = [point["label"] for point in results.summary[1:]]
        lost = {
            label: sum(mine["label"] == label and mine["score"] < full["score"] for full, mine in pairs) for label in labels
        }
        assert lost == {point["label"]: point["lost"] for point in results.summary[1:]}
    assert sum(file.stat().st_size for file in (RESULTS / "reference").rglob("*")) < 2_500_000


def test_runs_of_one_task_with_other_options_are_no_one_curve(tmp_path: Path) -> None:
    """Records of 10 and of 40 lines, asked before and after compression; what is the same everywhere is not said."""
    asked = {"a": (10, "visible"), "b": (40, "visible"), "c": (40, "hidden")}
    for name, (lines, question) in asked.items():
        folder = write_run(tmp_path / name)
        about = json.loads((folder / "run.json").read_text())
        about["identity"] |= {"task": {"name": "digits", "lines": lines, "file": None}, "protocol": {"question": question}}
        (folder / "run.json").write_text(json.dumps(about))
    names = frame([tmp_path / name for name in asked]).groupby("run")["task"].unique()
    assert [list(names[name]) for name in asked] == [
        [f"digits lines={lines} question={question}"] for lines, question in asked.values()
    ]
    assert set(frame([tmp_path / "b"])["task"]) == {"digits"}


def test_a_frame_has_a_row_per_policy_and_measure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "digits")
    points = frame([folder])
    assert len(points) == 3 * 5
    first = points[points["first"]]
    assert first["value"].tolist() == [row["value"] for row in read_summary(folder)]
    assert set(points["run"]) == {"digits"}


def test_kept_results_are_the_summary_the_flips_and_no_machine(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "digits")
    command = [sys.executable, str(ROOT / "scripts" / "keep_results.py"), str(folder), "--into", str(tmp_path / "kept")]
    for _ in range(2):  # again in place of what is there
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    kept = tmp_path / "kept" / "digits"
    assert sorted(file.name for file in kept.iterdir()) == ["environments.jsonl", "run.json", "samples.jsonl", "summary.jsonl"]
    assert (kept / "summary.jsonl").read_bytes() == (folder / "summary.jsonl").read_bytes()
    assert list(flips(read_results(kept))) == list(flips(read_results(folder)))
    assert len(read_results(kept).samples) == 7 + 7 + 1  # h2o's seven flips with those of the full cache, and mikv's
    (environment,) = read_results(kept).environments.values()
    assert "packages" in environment
    assert not {"system", "processors"} & environment.keys()
    subprocess.run([*command, "--summaries"], check=True, cwd=tmp_path, capture_output=True)
    assert sorted(file.name for file in kept.iterdir()) == ["environments.jsonl", "run.json", "summary.jsonl"]
    assert read_results(kept).samples == []
