"""S-IFEval: IFEval's checkers on instructions in the system prompt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import own_rows
import pytest
from conftest import ROOT, SHARED_DATA

from mikv.lm import sys_ifeval
from mikv.lm.sys_ifeval import NEEDS_PUNKT, SysIFEval
from mikv.tasks.base import Sample

LEFT_OUT = r"S-IFEval: 2 of 4 prompts are left out: their checkers need NLTK's punkt_tab.*python -m nltk\.downloader punkt_tab"


@pytest.fixture
def punkt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys_ifeval, "_has_punkt", lambda: True)


@pytest.fixture
def no_punkt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys_ifeval, "_has_punkt", lambda: False)


def samples(folder: Path) -> dict[int, Sample]:
    return {sample.doc_id: sample for sample in SysIFEval(data_dir=own_rows.write(folder)).samples(None, 0)}


@pytest.mark.usefixtures("punkt")
def test_samples_are_the_rows(tmp_path: Path) -> None:
    found = samples(tmp_path)
    assert sorted(found) == [0, 1, 2, 3]
    row = own_rows.ROWS["system_prompt/sys_ifeval.jsonl"][0]
    assert found[0].messages == row["messages"]
    assert found[0].question == "Tell me of day 0."
    assert found[0].target == "length_constraints:number_words, punctuation:no_comma"
    assert found[0].notes == {"prompt_id": 0, "category": "length_constraints"}


@pytest.mark.usefixtures("no_punkt")
def test_without_punkt_prompts_that_need_it_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert sorted(samples(tmp_path)) == [0, 1]
    assert re.search(LEFT_OUT, capsys.readouterr().out)


@pytest.mark.usefixtures("no_punkt")
@pytest.mark.parametrize(
    ("doc_id", "answer", "strict", "loose"),
    [
        (0, "a fine day it was", True, True),
        (0, "fine day", False, False),  # too few words
        (0, "a fine day, it was", False, False),  # a comma
        (0, "Sure, here it is:\na fine day it was", False, True),  # right but for a first line
        (1, "fine", True, True),
        (1, "fine, fine", False, False),
        (1, "", False, False),  # nothing said is nothing followed, as in IFEval
    ],
)
def test_all_of_a_prompts_instructions_must_be_followed(
    doc_id: int, answer: str, strict: bool, loose: bool, tmp_path: Path
) -> None:
    scored = SysIFEval().score(samples(tmp_path)[doc_id], answer)
    assert scored == {"correct": strict, "violation": not strict, "violation_loose": not loose}
    assert set(scored) == {"correct", *SysIFEval.flags}


def test_the_checkers_that_need_punkt_are_those_that_fail_without_it() -> None:
    """Every kind of instruction is tried where punkt is not there."""
    if not (SHARED_DATA / "system_prompt").is_dir():
        pytest.skip(f"published files are not in {SHARED_DATA}")
    if sys_ifeval._has_punkt():
        pytest.skip("punkt is here: nothing fails without it")
    utils = sys_ifeval._checkers()
    failed, tried = set(), set()
    for row in sys_ifeval.SOURCE.load(str(SHARED_DATA)):
        for instruction, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            asked = utils.InputExample(row["key"], [instruction], row["prompt"], [kwargs])
            tried.add(instruction)
            for answer in ("One two. Three!\n\nFOUR five six.", "P.S. [x] * y *"):
                try:
                    utils.test_instruction_following_loose(asked, answer)
                except LookupError:
                    failed.add(instruction)
    assert failed == NEEDS_PUNKT
    assert len(tried) == 25


def test_finding_out_is_quiet_and_downloads_nothing(tmp_path: Path) -> None:
    code = f"""
import nltk
nltk.download = lambda *_: print("DOWNLOAD")
from mikv.lm.sys_ifeval import SysIFEval
task = SysIFEval(data_dir={own_rows.write(tmp_path)!r})
print(task.score(task.samples(1, 0)[0], "fine fine fine"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    notes = done.stdout.splitlines()[:-1]
    assert all(line.startswith("note: S-IFEval") for line in notes)


def test_a_language_is_detected_the_same_each_time(tmp_path: Path) -> None:
    row = {
        **own_rows.ROWS["system_prompt/sys_ifeval.jsonl"][0],
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "de"}],
    }
    data = own_rows.write(tmp_path, {"system_prompt/sys_ifeval.jsonl": [row]})
    task = SysIFEval(data_dir=data)
    (sample,) = task.samples(None, 0)
    assert len({task.score(sample, "er der die in an")["correct"] for _ in range(30)}) == 1
