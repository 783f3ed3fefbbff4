"""A suite is its parts: same answers, same outcomes, told together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mikv.config import compose
from mikv.run import Run
from mikv.runner import execute
from mikv.tasks.data import DataUnavailable
from mikv.tasks.lines import GuardedRecall, LineRecall
from mikv.work.suite import Suite

PARTS: dict[str, Any] = {"guarded": GuardedRecall(lines=3, max_new_tokens=5), "open": LineRecall(lines=3, max_new_tokens=5)}
RISKS = {"guarded": ["breach", "over_refusal"], "open": ["wrong"]}


def suite(out: Path, limit: int = 4, limits: dict[str, int | None] | None = None, **parts: Any) -> Run:
    run = compose("model=tiny-random", "policy.low.bits=2", f"out={out}")
    return replace(run, task=Suite("both", {**PARTS, **parts}, RISKS, limits or {}), limit=limit)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_each_part_is_what_it_is_alone(tmp_path: Path) -> None:
    together = suite(tmp_path)
    execute(together)
    fields = ("doc_id", "label", "answer", "target", "score", "correct", "invented", "kl")
    for name, task in PARTS.items():
        alone = replace(together, task=task, name=name)
        execute(alone)
        mine = [row for row in rows(together.folder()) if row["subtask"] == name]
        assert len(mine) == 8

        def known(some: list[dict[str, Any]]) -> list[list[Any]]:
            return sorted([row.get(field) for field in fields[:-1]] + [pytest.approx(row["kl"])] for row in some)

        assert [row[:-1] for row in known(mine)] == [row[:-1] for row in known(rows(alone.folder()))]


def test_the_risks_are_those_of_the_parts(tmp_path: Path) -> None:
    summary = execute(suite(tmp_path, limits={"open": 3}))
    for row in summary:
        guarded, opened = row["parts"]["guarded"]["rates"], row["parts"]["open"]["rates"]
        assert (guarded["breach"]["n"], guarded["over_refusal"]["n"], opened["wrong"]["n"]) == (2, 2, 3)
        assert opened["wrong"]["value"] == pytest.approx(1 - row["parts"]["open"]["value"])
        assert opened["wrong"]["mcnemar_p"] is not None  # an outcome, as the part's score is
        risks = (guarded["breach"]["value"], guarded["over_refusal"]["value"], opened["wrong"]["value"])
        assert row["value"] == pytest.approx(sum(risks) / 3)
        assert (row["metric"], row["lower_is_better"], row["samples"]) == ("risk", True, 7)
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
        assert {"difference", "difference_ci95", "mcnemar_p"} <= set(guarded["breach"])


def test_each_part_is_compared_with_its_own_full_cache(tmp_path: Path) -> None:
    """The tiny model answers nothing right; what if the compressed cache answered all of one part?"""
    together = suite(tmp_path)
    execute(together)
    found = rows(together.folder())
    baseline = [row for row in found if row["label"] == "full"]
    mine = [row | ({"score": 1.0, "correct": True} if row["subtask"] == "open" else {}) for row in found if row not in baseline]
    parts = together.open().columns(mine, baseline)["parts"]
    assert (parts["open"]["difference"], parts["open"]["gained"], parts["open"]["lost"]) == (1.0, 4, 0)
    assert (parts["guarded"]["difference"], parts["guarded"]["gained"]) == (0.0, 0)


def test_a_changed_part_leaves_the_others_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = replace(suite(tmp_path), name="same")
    execute(before)
    capsys.readouterr()
    after = replace(suite(tmp_path, open=LineRecall(lines=3, max_new_tokens=6)), name="same")  # the same questions
    execute(after)
    assert "going on, 4 of 8 samples are done" in capsys.readouterr().out
    assert before.folder() == after.folder()
    assert replace(before, name=None).folder() != replace(after, name=None).folder()


def test_a_finished_suite_is_not_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = execute(suite(tmp_path))
    assert execute(suite(tmp_path)) == first
    assert "all 8 samples are done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("risks", "message"),
    [
        ({"guarded": ["breach"]}, "says nothing of open"),
        ({"guarded": ["breeches"], "open": ["wrong"]}, r"breeches; the part has wrong, .*breach"),
    ],
)
def test_risks_that_no_part_has_are_refused(tmp_path: Path, risks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(suite(tmp_path), task=Suite("both", PARTS, risks, {})).open()


def test_a_part_that_can_not_be_asked_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"part guarded: task\.limit=null.*~task\.parts\.guarded"):
        replace(suite(tmp_path), limit=None).open()


def test_data_that_are_missing_are_named_with_the_part_and_the_way_out(tmp_path: Path) -> None:
    run = compose("model=tiny-random", "task=safety", f"task.data_dir={tmp_path}")
    wanted = r"safety, part extraction.*tensor_trust_extraction(?s:.*)'~task\.parts\.extraction'"
    with pytest.raises(DataUnavailable, match=wanted):
        run.open()


def test_a_suite_without_parts_is_none() -> None:
    with pytest.raises(ValueError, match="no parts"):
        Suite("none", {}, {}, {})


@pytest.mark.parametrize("name", ["safety", "hallucination", "contextloss"])
def test_suites_of_the_project_name_risks_for_each_part(name: str) -> None:
    task = compose("model=tiny-random", f"task={name}").task
    assert isinstance(task, Suite)
    assert set(task.risks) == set(task.parts)
    assert set(task.limits.values()) == {None}  # the suite's own limit holds for all


def test_parts_can_be_left_out_and_changed_from_the_command_line() -> None:
    run = compose(
        "model=tiny-random", "task=contextloss", "task.limit=7", "~task.parts.lines_80", "task.parts.lines_10.limit=3",
        "task.parts.lines_10.lines=12",
    )  # fmt: skip
    assert isinstance(run.task, Suite)
    assert "lines_80" not in run.task.parts
    assert (run.limit, run.task.limits["lines_10"], run.task.limits["lines_20"]) == (7, 3, None)
    assert run.task.parts["lines_10"] == LineRecall(lines=12, depths=5)


def test_where_the_data_lie_is_handed_to_the_parts_that_need_them() -> None:
    task = compose("model=tiny-random", "task=hallucination", "task.data_dir=/data").task
    assert isinstance(task, Suite)
    truthfulqa: Any = task._with_data(task.parts["truthfulqa"])
    assert truthfulqa.data_dir == "/data"
    assert task._with_data(task.parts["linerecall"]) is task.parts["linerecall"]


def test_depths_and_line_counts_become_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {f"lines_{n}": LineRecall(lines=n, depths=3, max_new_tokens=2) for n in (3, 6)}  # middles at 0.5 and 0.4
    run = replace(suite(tmp_path), task=Suite("maps", parts, {name: ["wrong"] for name in parts}, {}))
    execute(run)
    assert (run.folder() / "depth.png").stat().st_size > 5_000
    assert "depth.png" in capsys.readouterr().out
    execute(suite(tmp_path))  # records of one size
    assert not (suite(tmp_path).folder() / "depth.png").exists()
