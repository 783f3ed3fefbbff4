"""Every task of published data, from its YAML to a record: on rows of our own, with the tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import own_rows
import pytest
from conftest import ROOT

from mikv.config import compose
from mikv.records import read_rows
from mikv.runner import execute
from mikv.tasks.data import DataUnavailable
from mikv.work.base import task_identity

VARIANTS = [
    *(("tensor_trust", f"task.kind={kind}") for kind in ("extraction", "hijacking", "helpful")),
    ("sys_ifeval",),
    *(("harmful_requests", f"task.source={source}") for source in ("advbench", "harmbench", "jailbreakbench")),
    ("xstest",),
    *(("context_qa", f"task.source={source}") for source in ("xquad", "nq_open")),
    ("key_value",),
    ("ruler_file",),
    *(("memo_trap", f"task.part={part}") for part in ("ending", "translation")),
]
every_task = pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
HIDEABLE = [variant for variant in VARIANTS if variant[0] != "memo_trap"]
SHORT = {"memo_trap": ()}  # it generates nothing


def composed(variant: tuple[str, ...], folder: Path, *more: str) -> Any:
    data = own_rows.write(folder)
    short = SHORT.get(variant[0], ("task.max_new_tokens=4",))
    options = ["model=tiny-random", "policy=uniform", "policy.tier.bits=2", f"out={folder / 'runs'}", "task.limit=2"]
    return compose(f"task={variant[0]}", *variant[1:], f"task.data_dir={data}", *options, *short, *more)


@every_task
def test_it_runs_and_its_records_say_what_a_sample_was(variant: tuple[str, ...], tmp_path: Path) -> None:
    run = composed(variant, tmp_path)
    full, compressed = execute(run)
    rows = list(read_rows(run.folder() / "samples.jsonl"))
    count = 1 if variant[1:] == ("task.part=translation",) else 2
    assert [len(rows), full["samples"], compressed["samples"]] == [2 * count, count, count]
    work = run.open()
    for row in rows:
        assert {"answer", "target", "correct", "score"} <= set(row)
        assert set(work.flags) & set(row)
    assert set(full["rates"]) == set(work.flags)


@pytest.mark.parametrize("variant", HIDEABLE, ids=" ".join)
def test_the_cache_can_be_compressed_before_the_question(variant: tuple[str, ...], tmp_path: Path) -> None:
    """What a question's tokens hold is the sample's question, and nothing that stands before it."""
    from mikv.models.load import load

    run = composed(variant, tmp_path, "protocol.question=hidden")
    loaded, work = load(run.model), run.open()
    samples = {sample.doc_id: sample for sample in run.task.samples(2, run.seed)}
    for unit in work.units():
        (request,) = work.encode(unit, loaded).requests
        assert loaded.tokenizer.decode(request.prompt.question).strip() == samples[unit.doc_id].question.strip()


@every_task
def test_where_data_lie_is_no_part_of_what_is_asked(variant: tuple[str, ...], tmp_path: Path) -> None:
    here, there = (composed(variant, tmp_path / place) for place in ("here", "there"))
    assert task_identity(here.task) == task_identity(there.task)
    assert str(tmp_path) not in str(task_identity(here.task))
    assert [here.key(here.panel[0], unit) for unit in here.open().units()] == [
        there.key(there.panel[0], unit) for unit in there.open().units()
    ]


@every_task
def test_the_seed_draws_and_a_larger_limit_only_adds(variant: tuple[str, ...], tmp_path: Path) -> None:
    def drawn(*more: str) -> list[int]:
        return [unit.doc_id for unit in composed(variant, tmp_path, *more).open().units()]

    assert drawn("task.limit=2") == drawn("task.limit=3")[:2]
    every = drawn("task.limit=null")
    assert len(set(every)) == len(every)
    if len(every) > 2:
        assert any(drawn("task.limit=null", f"seed={seed}") != every for seed in range(1, 9))


@every_task
def test_data_that_are_not_there_are_said_before_a_model_is_loaded(variant: tuple[str, ...], tmp_path: Path) -> None:
    run = composed(variant, tmp_path, f"task.data_dir={tmp_path / 'nowhere'}")
    with pytest.raises(DataUnavailable, match=r"nowhere/.*\.jsonl or .*nowhere/.*\.jsonl(.|\n)*Ways to get it"):
        run.open()


def test_the_command_line_says_it_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "task=tensor_trust", "model=tiny-random", f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("\nerror: Tensor Trust, extraction is on no hub.\nWays to get it:")
    assert "Traceback" not in done.stderr
