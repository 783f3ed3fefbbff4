"""A run that is killed, or told to stop, goes on where it was: its records end up as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_runner import TINY, composed, outcomes, rows

from mikv.records import RunFolder
from mikv.runner import execute
from mikv.stopping import Stopped, Stopping

KILLS = 10


def started(tmp_path: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "run.py", *TINY, f"out={tmp_path}", f"name={name}", *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_more(file: Path, than: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and lines(file) == than:
        time.sleep(0.002)


def test_killed_at_random_moments_many_times_the_records_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """kill -9, SIGTERM and SIGUSR2 of a real process (trap T30): identical, no sample twice, none missing, and each kill costs
    at most the batch in flight. Prints what happened: pytest -s. A prompt at a time: in other company (what a kill leaves of a
    batch) the last digits of fidelity move."""
    options = ["task._target_=slow_lines.SlowLines", "task.lines=5", "task.limit=100", "batch_size=1"]
    whole = composed(tmp_path, "name=whole", *options[1:])
    execute(whole)
    samples, rng = tmp_path / "cut" / "samples.jsonl", random.Random(0)
    survived, stops = 0, 0
    for kill in range(KILLS):
        # now and then before the first record: while modules or weights load, while it claims the folder
        early = kill % 6 == 5
        number = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2)[kill % 4]
        process = started(tmp_path, "cut", *options)
        before = lines(samples)
        assert before >= survived
        if not early:
            wait_for_more(samples, before, process)
        time.sleep(rng.random() * (2 if early else 0.6))
        seen = lines(samples)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        survived = lines(samples)
        assert survived >= seen
        if "after a finished batch" in output:
            stops += 1
            assert process.returncode == 128 + number, output
            assert (survived - before) % 2 == 0, "a sample's two policies are there or not"
        print(f"{kill + 1:>2}. {number.name:<8} after {survived - before:>3} new lines; {survived:>3} of 200 are there")
    assert stops >= 3
    assert 0 < survived < 200
    process = started(tmp_path, "cut", *options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert re.search(r"going on, \d+ of 100 samples are done", output), output
    assert len(rows(samples)) == 200
    assert outcomes(samples) == outcomes(tmp_path / "whole" / "samples.jsonl")
    assert rows(tmp_path / "cut" / "summary.jsonl")[1]["value"] == rows(tmp_path / "whole" / "summary.jsonl")[1]["value"]


def test_a_signal_waits_for_the_batch_and_the_scheduler_is_called_when_the_folder_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's handler requeues the job and ends the process: then the claim must have been given back."""
    append, called = RunFolder.append, []

    def signalled(self: RunFolder, new: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR2)
        monkeypatch.setattr(RunFolder, "append", append)
        return append(self, new)

    def requeue(number: int, _: object) -> None:
        with RunFolder(tmp_path / "x", run.identity, ""):
            called.append((number, lines(tmp_path / "x" / "samples.jsonl")))

    run = composed(tmp_path, "name=x", "task.limit=6")
    monkeypatch.setattr(RunFolder, "append", signalled)
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(Stopped, match="SIGUSR2 after a finished batch; the same command goes on"):
            execute(run)
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [(signal.SIGUSR2, 2 * 2)]  # a batch of two, two policies


def test_a_second_signal_does_not_wait() -> None:
    """SIGTERM at the time limit itself, after SIGUSR2 before it: SIGKILL is near."""
    with Stopping():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_ends_takes_no_notice_of_a_late_signal_and_leaves_the_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    with Stopping():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == before
