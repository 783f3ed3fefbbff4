"""Nothing moved: answers, tiers and bytes are those of the last commit before tiers became chains, bit for bit."""

from __future__ import annotations

import subprocess

import pytest
from conftest import ROOT

from scripts import compare_commits

BEFORE = "afd6282"  # the last commit with two tiers, one quantizer and one move per step


def test_the_policies_of_before_give_what_they_gave() -> None:
    """A panel of all of them with the tiny model; scripts/compare_commits.py does the reference runs' prompts."""
    if subprocess.run(["git", "cat-file", "-e", f"{BEFORE}^{{commit}}"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"commit {BEFORE} is not in this clone's history")
    assert compare_commits.main([BEFORE, "--tiny", "--only", "working"]) == 0


def test_a_difference_is_told() -> None:
    row = {"label": "mikv", "sample": "0", "answer": "1", "nbytes": {"raw": 2}, "key": "a", "seconds": {"decode": 1}}
    assert not list(compare_commits.differences([row], [row | {"key": "b", "seconds": {}}]))
    assert list(compare_commits.differences([row], [row | {"nbytes": {"raw": 3}}])) == [
        'mikv · 0: nbytes: {"raw": 2} -> {"raw": 3}'
    ]
    assert list(compare_commits.differences([row], [row, row | {"sample": "1"}])) == ["mikv · 1: only in ours"]
    assert list(compare_commits.differences([row], [{k: v for k, v in row.items() if k != "answer"}])) == [
        'mikv · 0: answer: "1" -> null'
    ]
