"""Every experiment can be composed and run; its table says what the records say."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from experiments import field, front, steps
from experiments.base import adjusted, compare, paper_table, percent, points
from experiments.risks import BUDGETS, budget, risks
from experiments.risks import table as risk_table
from mikv.config import CONF, compose
from mikv.models.tiny import byte_tokenizer, tiny_config, tiny_model
from mikv.plots import risk_grid
from mikv.results import Results
from mikv.runner import execute

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
SHORT = ["task.limit=3", "batch_size=4"]
LINES = [*SHORT, "task.lines=4", "task.max_new_tokens=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model on disk whose heads have 64 channels, as those of the models that the experiments are made for."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config(head_dim=64)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ["model=smollm2-135m", f"model.path={folder}"]


def program(name: str, *arguments: str) -> None:
    """What `python -m experiments.NAME ARGUMENTS` does."""
    sys.modules.pop(f"experiments.{name}", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(f"experiments.{name}", run_name="__main__")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_run_that_can_be_opened(name: str, model: list[str]) -> None:
    run = compose(f"experiment={name}", *model, "task=linerecall", *LINES)
    assert len(run.open().units()) == 3
    assert run.panel[0].name == "full"
    assert len({policy.label for policy in run.panel}) == len(run.panel) > 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_module_that_says_how_to_run_it(name: str) -> None:
    module = importlib.import_module(f"experiments.{name}")
    assert f"python -m experiments.{name}" in str(module.__doc__)


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "ablations", "steps"])
def test_the_program_prints_the_table_of_its_records(
    name: str, model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(name, *model, "task=linerecall", f"out={tmp_path}", *LINES)
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*/summary.jsonl")
    for row in map(json.loads, file.read_text().splitlines()):
        cells = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
        mine = [line for line in cells if row["label"] in line][-1]  # the run's own table comes before
        assert f"{row['size_percent']:.1f}" in mine
    program(name, *model, "task=linerecall", f"out={tmp_path}", *LINES)
    assert "all 3 samples are done already" in capsys.readouterr().out


def test_every_step_of_our_policy_has_a_row_that_says_what_is_left_out(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program("steps", *model, "task=linerecall", f"out={tmp_path}", *LINES)
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    named = {cells[2]: cells[1] for cells in lines if len(cells) == 9}
    assert named[steps.BASE] == ""
    assert set(steps.CHOICES.values()) <= set(named.values())


@pytest.fixture(scope="module")
def seen_runs(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two short runs of each of the panels that are shown together."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("front", "importance"):
        for text in ("prose", "code"):
            options = [f"task.text={text}", "task.context=60", "task.tail=4", "task.limit=2", f"out={out}"]
            execute(compose(f"experiment={name}", *model, *options))
    return out


@pytest.mark.parametrize("name", ["front", "importance"])
def test_runs_of_a_panel_are_shown_together(
    name: str, seen_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the values of their records; texts by their names; into one figure."""
    program(name, "--records", str(seen_runs), "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size > 20_000
    mine = [folder for folder in seen_runs.iterdir() if name in folder.name]
    assert len(mine) == 2
    rows = [json.loads(line) for folder in mine for line in (folder / "summary.jsonl").read_text().splitlines()]
    shown = [row for row in rows if row["policy"] != "full" or name == "front"]
    for row in shown:
        assert f"{row['label']} " in printed
        assert f"{row['value']:.3g}" in printed
    if name == "front":
        assert "fidelity prose" in printed
        assert "fidelity code" in printed
    else:
        assert printed.count("none; 1.55 more key bits") == 2


def test_a_rival_has_as_many_bytes_or_up_to_a_quarter_more() -> None:
    def row(policy: str, size: float, value: float, lower: bool = True) -> dict[str, Any]:
        return {"policy": policy, "label": f"{policy} {size}", "size_percent": size, "value": value, "lower_is_better": lower}

    rows = [
        row("full", 100, 0),
        row("whiten", 20, 0.1),
        row("a", 19.9, 0.01),
        row("b", 20, 0.9),
        row("c", 25, 0.4),
        row("d", 25.1, 0),
    ]
    found = front.rival(rows[1], rows)
    assert found is not None
    assert found["label"] == "c 25"
    scores = [{**r, "lower_is_better": False} for r in rows]
    best = front.rival(scores[1], scores)
    assert best is not None
    assert best["label"] == "b 20"
    assert front.rival(row("whiten", 30, 0.1), rows) is None


def test_a_neighbour_is_the_best_other_method_at_equal_bytes() -> None:
    def row(policy: str, size: float, value: float) -> dict[str, Any]:
        return {"policy": policy, "label": f"{policy} {size}", "size_percent": size, "value": value, "lower_is_better": False}

    rows = [
        row("full", 20, 1),
        row("a", 20, 0.5),
        row("a", 20.5, 0.9),
        row("b", 18.9, 0.7),
        row("b", 18, 0.8),
        row("c", 21, 0.6),
    ]
    found = field.neighbour(rows[1], rows)
    assert found is not None
    assert found["label"] == "b 18.9"
    best = field.neighbour(rows[3], rows)
    assert best is not None
    assert best["label"] == "a 20"  # 20.5 is more than 6 % above 18.9
    assert field.neighbour(row("d", 50, 1), rows) is None


def test_the_field_shows_each_run_and_draws_a_figure_per_task(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paired with neighbours, marked where no smaller policy is better; both protocols in one figure."""
    few = "[{policy: full}, {policy: snapkv, size: [0.3, 0.5]}, {policy: knorm, size: 0.5}, {policy: kivi, residual: 32}]"
    for question in ("visible", "hidden"):
        asked = [f"panel.entries={few}", f"protocol.question={question}", f"out={tmp_path}", f"name={question}"]
        execute(compose("experiment=field", *model, "task=linerecall", *LINES, *asked))
    capsys.readouterr()
    program("field", "--records", str(tmp_path), "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert (tmp_path / "field-linerecall.png").stat().st_size > 20_000
    assert "question hidden" in printed
    for name in ("visible", "hidden"):
        rows = [json.loads(line) for line in (tmp_path / name / "summary.jsonl").read_text().splitlines()]
        snap = [row["size_percent"] for row in rows if row["policy"] == "snapkv"]
        assert len(snap) == 2
        assert name == "hidden" or [round(size, -1) for size in snap] == [30, 50]  # a question is kept, and is long here
        for row in rows:
            cells = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines() if row["label"] in line]
            assert any(f"{row['size_percent']:.1f}" in cell and f"{row['value']:.3g}" in " ".join(cell) for cell in cells)
    knorm = next(line for line in printed.splitlines() if line.split("│")[1:2] and "knorm" in line.split("│")[1])
    assert "snapkv" in knorm  # its neighbour
    assert "full" in next(line for line in printed.splitlines() if line.rstrip().endswith("│") and "│ full" in line)


def test_no_run_of_a_panel_ends_with_the_command_that_makes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program("front", "--records", str(tmp_path))
    assert ended.value.code == 2
    assert "python run.py panel=front task=fidelity" in capsys.readouterr().err


def test_pareto_runs_its_tasks_and_draws_both_figures(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = "tasks=linerecall task.lines=4 task.max_new_tokens=4,fidelity task.context=20 task.tail=4"
    program("pareto", tasks, *model, f"out={tmp_path / 'runs'}", "task.limit=2", "name=x", f"figures={tmp_path / 'figures'}")
    assert {file.parent.name for file in (tmp_path / "runs").glob("*/summary.jsonl")} == {"x-linerecall", "x-fidelity"}
    for png in (tmp_path / "figures").glob("*.png"):
        assert png.stat().st_size > 10_000
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
    assert "on the front" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_the_papers_numbers_stand_beside_policies_of_the_panel(name: str) -> None:
    paper = importlib.import_module(f"experiments.{name}").PAPER
    assert set(paper) <= {policy.label for policy in compose(f"experiment={name}", "model=tiny-random").panel}
    assert all(0 <= value <= 100 for value in paper.values())


def test_wrong_overrides_end_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program("table1", "model=tiny-random", "task.linse=4")
    assert ended.value.code == 2
    assert "task.linse" in capsys.readouterr().err


def test_two_policies_are_compared_on_the_samples_that_both_have() -> None:
    rows = [("a", "1", 1.0), ("a", "2", 0.0), ("a", "3", 1.0), ("b", "2", 1.0), ("b", "1", 1.0), ("b", "4", 0.0)]
    samples = [{"label": label, "sample": sample, "score": score} for label, sample, score in [*rows, ("a", "4", None)]]
    got = compare(Results("run", [{"kind": "outcome"}], samples, {}, {}, ""), "a", "b")
    assert got is not None
    assert (got.n, got.difference, got.lower, got.higher, got.p) == (2, -0.5, 1, 0, 1.0)
    numbers = compare(Results("run", [{"kind": "divergence"}], samples, {}, {}, ""), "a", "b")
    assert numbers is not None
    assert numbers.p is None


def test_two_policies_are_compared_by_the_contexts_of_their_samples() -> None:
    """Six questions on two texts, all lost on one of them: one flip of two, not of three."""
    scores = {"a": [0, 0, 0, 1, 1, 1], "b": [1, 1, 1, 1, 1, 1]}
    samples = [
        {"label": label, "sample": str(i), "score": float(score), "cluster": f"text {i // 3}"}
        for label, of_it in scores.items()
        for i, score in enumerate(of_it)
    ]
    got = compare(Results("run", [{"kind": "outcome"}], samples, {}, {}, ""), "a", "b")
    assert got is not None
    assert got.p == 1.0  # of 0.25 without texts


def test_p_values_of_a_table_are_adjusted_for_each_other() -> None:
    """Three tests: 0.01, 0.02, 0.04 times 3, 2, 1; what has no test counts for none."""
    got = adjusted({"a": 0.04, "b": None, "c": 0.01, "d": 0.02})
    assert got == pytest.approx({"a": 0.04, "c": 0.03, "d": 0.04})
    row = {"policy": "h2o", "model": "m", "task": "t", "metric": "accuracy", "value": 0.5, "ci95": [0.4, 0.6], "n": 9,
           "size_percent": 20.0, "size_percent_paper": 20.0, "difference": -0.5, "difference_ci95": None}  # fmt: skip
    full = row | {"policy": "full", "label": "full", "mcnemar_p": 1.0}
    table = paper_table("T", [full, *(row | {"label": label, "mcnemar_p": p} for label, p in (("a", 0.01), ("b", 0.04)))], {})
    assert list(table.columns[3].cells) == ["", "0.02", "0.04"]
    assert "Holm" in table.caption
    assert list(table.columns[2].cells) == ["", "-50.0", "-50.0"]  # no interval, no brackets


def test_ablations_of_divergences_compare_numbers(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of two policies are compared with each other, as numbers; the full cache's own 0 has no interval."""
    short = ["task=fidelity", "task.context=40", "task.tail=8", "task.limit=3", f"out={tmp_path}"]
    program("ablations", *model, *short)
    cells = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    (full,) = [line for line in cells if len(line) == 9 and line[2] == "full"]
    assert full[3:6] == ["0", "", ""]
    changed = [line for line in cells if len(line) == 9 and line[2].startswith("mikv") and "[" in line[4]]
    assert len(changed) >= 3
    assert {line[5] for line in changed} == {""}


def test_numbers_as_they_are_printed() -> None:
    assert percent(0.926, [0.8811, 0.955]) == "92.6 \\[88.1, 95.5]"
    assert points(-0.074, [-0.12, -0.03]) == "-7.4 \\[-12.0, -3.0]"
    assert percent(1.0, None) == "100.0"


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(15.9, None), (16.0, 20), (20.0, 20), (21.7, None), (24.0, 30), (31.4, 30), (35.0, None), (43.9, 50), (55.0, None)],
)
def test_a_cache_belongs_to_the_budget_that_it_fits_and_uses(size: float, wanted: int | None) -> None:
    assert budget(size) == wanted
    assert wanted is None or wanted in BUDGETS


def rate(value: float, n: int = 10) -> dict[str, Any]:
    return {"value": value, "n": n, "stderr": 0.1, "ci95": [0.0, 1.0], "difference": 0.5, "difference_ci95": [0.25, 0.75],
            "mcnemar_p": 0.01, "lost": 5, "gained": 0}  # fmt: skip


def summary_row(policy: str, size: float, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "label": policy, "model": "m", "task": "safety", "question": "visible", "size_percent": size,
            "rates": {}, **more}  # fmt: skip


def test_risks_of_a_suite_and_of_a_single_task_are_rows_alike() -> None:
    parts = {"recall": {"rates": {"breach": rate(0.75), "other": rate(0.1)}}, "qa": {"rates": {"wrong": rate(0.5)}}}
    suite = summary_row("h2o", 20.5, parts=parts, risks={"recall": ["breach", "over_refusal"], "qa": ["wrong"]})
    got = list(risks([suite]))
    assert [(row["risk"], row["rate"], row["budget"], row["change"]) for row in got] == [
        ("recall breach", 0.75, 20, 0.5),
        ("qa", 0.5, 20, 0.5),
    ]
    alone = summary_row("full", 100.0, task="guardedrecall", rates={"breach": rate(0.25)})
    (row,) = risks([alone])
    assert (row["risk"], row["rate"], row["budget"], row["change"]) == ("guardedrecall breach", 0.25, None, None)


def test_a_rate_of_which_nothing_is_known_is_shown_without_an_interval(tmp_path: Path) -> None:
    """All of its samples share one context."""
    unknown = rate(0.5) | {"ci95": None, "difference_ci95": None}
    rows = list(
        risks([summary_row(name, size, task="t", rates={"breach": unknown}) for name, size in (("full", 100.0), ("h2o", 20.0))])
    )
    assert list(risk_table(rows).columns[2].cells) == ["0.50", "0.50 +50 *"]
    risk_grid(rows, "title").savefig(tmp_path / "risks.png")


def test_risks_become_a_table_and_a_figure(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mikv.runner import execute

    execute(compose("panel=risk", "task=guardedrecall", *model, f"out={tmp_path / 'runs'}", *LINES))
    execute(compose("panel=demo", "task=guardedrecall", *model, f"out={tmp_path / 'runs'}", *LINES))  # not of this panel
    capsys.readouterr()
    program("risks", "--records", str(tmp_path / "runs"), "--out", str(tmp_path / "figures"))
    printed = capsys.readouterr().out
    assert "guardedrecall breach (n = 2)" in printed
    assert all(f"{b} % of the bytes" in printed for b in BUDGETS)
    (png,) = (tmp_path / "figures").glob("*.png")
    assert png.stat().st_size > 10_000
    (csv,) = (tmp_path / "figures").glob("*.csv")
    assert len(csv.read_text().splitlines()) == 1 + 4 * 15  # four risks of fifteen policies


def test_risks_run_what_is_missing_of_the_suites(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("experiments.risks"), "SUITES", ("guardedrecall", "linerecall"))
    module = sys.modules["experiments.risks"]
    arguments = ["--out", str(tmp_path), "--run", *model, f"out={tmp_path / 'runs'}", *LINES]
    module.main(arguments)
    assert len(list((tmp_path / "runs").glob("*-risk-*/summary.jsonl"))) == 2
    printed = capsys.readouterr().out
    assert "guardedrecall breach (n = 2)" in printed
    assert "linerecall invented (n = 3)" in printed


def test_without_runs_the_way_to_get_some_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program("risks", "--records", str(tmp_path))
    assert "python run.py panel=risk" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", sorted(f.stem for f in (ROOT / "experiments").glob("*.py") if f.stem not in ("__init__", "base"))
)
def test_every_experiment_says_what_it_is_and_answers_a_slip(name: str) -> None:
    def said(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"experiments.{name}", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    told = said("--help")
    assert told.returncode == 0, told.stderr
    assert f"python -m experiments.{name}" in told.stdout
    slip = said(*(["--run"] if name in ("risks", "front", "importance", "field") else []), "policy.kep=0.1")
    assert slip.returncode == 2
    assert "Traceback" not in slip.stderr
    assert "did you mean policy.keep?" in slip.stderr
