"""Policies, models and tasks in a folder of the user's own: found by their files, beside those of conf/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import POLICIES, ROOT, STRANGER_FILES, STRANGERS, named_policy

from mikv.config import ConfigError, checked, compose, options_of_policy, own_folder, policy

OWN = f"conf_dir={STRANGER_FILES}"


@pytest.mark.parametrize("name", [*POLICIES, *STRANGERS])
def test_a_policy_of_a_panel_is_what_hydra_composes(name: str) -> None:
    """Two ways to read a YAML that inherits: one for `policy=`, one, without Hydra, for a panel's entries."""
    composed = checked([OWN, f"policy={name}"]).policy
    assert options_of_policy(name, STRANGER_FILES) == composed
    run = compose(OWN, f"panel.entries=[{{policy: {name}}}]", "panel=demo", "model=tiny-random")
    assert run.panel[-1] == named_policy(name) == compose(OWN, f"policy={name}", "model=tiny-random").panel[-1]


def test_three_policies_inherit_their_tiers_from_one_file() -> None:
    """And what others are made of is no policy."""
    for name in ("mikv", "random", "recent_only"):
        assert {"keep", "high", "low", "balance", "budget"} < set(options_of_policy(name))
    with pytest.raises(ConfigError, match="there is no policy '_tiers'"):
        checked(["policy=_tiers"])


def test_a_yaml_may_inherit_from_the_projects(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "gentle.yaml").write_text("defaults: [mikv, _self_]\nkeep: 0.6\n")
    made = policy("gentle", {"low.bits": 4}, own_folder(str(tmp_path)))
    assert made == policy("mikv", {"keep": 0.6, "low.bits": 4})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conf_dir=nowhere", "policy=mikv"], "conf_dir=nowhere: wanted a folder"),
        ([f"conf_dir={ROOT / 'mikv' / 'kernels'}"], "wanted a folder that holds YAML files in one of"),
        ([OWN, "policy=jruy"], "did you mean policy=jury"),
        ([OWN, "policy=jury", "policy.windw=3"], "did you mean policy.window"),
        (["policy=jury"], "there is no policy 'jury'"),
    ],
)
def test_a_slip_is_answered(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(arguments)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (["policy.low=k4v3"], ["policy.low.key_bits=4", "policy.low.value_bits=3"]),
        (["policy.low=3"], ["policy.low.bits=3"]),
        (["policy.low.key=[balance,affine2]", "policy.balance=false"], ["policy.high.bits=16"]),
    ],
)
def test_a_tier_may_be_written_in_short(short: list[str], long: list[str]) -> None:
    one, other = (compose("policy=mikv", "model=tiny-random", *arguments).panel[1] for arguments in (short, long))
    assert one.identity() == other.identity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy.low=four"], "no tier"),
        (["policy.low.key=[centre,balnce,affine2]"], "key: 'balnce' is no step.*Did you mean balance"),
        (["policy.low.value=[balance,affine2]"], "values know nothing of"),
        (["policy.high.key=[rotate,16]"], "is not transformed"),
    ],
)
def test_a_tier_that_can_not_be_is_refused_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(["policy=mikv", *arguments])


def test_strangers_run_alone_and_in_a_sweep(tmp_path: Path) -> None:
    """From the command line, by name, without a word of the project being changed."""
    small = ["model=tiny-random", "task.lines=4", "task.limit=2", "task.max_new_tokens=3", f"out={tmp_path}", OWN]
    alone = subprocess.run(
        [sys.executable, "run.py", "policy=blocks", "name=alone", "reader=kernel", *small],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert "the kernels can't read what these store" in alone.stdout
    rows = [json.loads(line) for line in (tmp_path / "alone" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert {(row["policy"], row["reader"]) for row in rows} == {("full", "kernel"), ("blocks", "packed")}
    swept = subprocess.run(
        [sys.executable, "run.py", "-m", "policy=ladder,jury", *small], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert swept.returncode == 0, swept.stdout + swept.stderr
    lines = [line for file in tmp_path.glob("*/summary.jsonl") for line in file.read_text("utf-8").splitlines()]
    found = {json.loads(line)["policy"] for line in lines}
    assert {"blocks", "jury", "ladder"} <= found
