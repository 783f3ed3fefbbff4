"""A run that is killed, or told to stop, goes on where it was: its records end up as if nothing had happened."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import slow_lines
from conftest import ROOT
from test_runner import TINY, composed, outcomes, rows

from mikv.records import RunFolder
from mikv.runner import execute
from mikv.stopping import Stopped, Stopping, at_once, tell

KILLS = 10


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
# Half a second a batch: the jobs of a sweep are at work at the same time, and a signal finds them in a batch.
SLOW = ["model=tiny-random", "task._target_=slow_lines.SlowLines", "task.lines=3", "task.limit=20", "task.max_new_tokens=4"]


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Also where the tests run under nohup, whose children ignore them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def started(tmp_path: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "run.py", *TINY, f"out={tmp_path}", f"name={name}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_more(file: Path, than: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and lines(file) == than:
        time.sleep(0.002)


def test_killed_at_random_moments_many_times_the_records_are_those_of_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9, SIGTERM and SIGUSR2 of a real process (trap T30): identical, no sample twice, none missing, and each kill costs
    at most the batch in flight. Prints what happened: pytest -s. A prompt at a time: in other company (what a kill leaves of a
    batch) the last digits of fidelity move."""
    options = ["task._target_=slow_lines.SlowLines", "task.lines=5", "task.limit=100", "batch_size=1"]
    monkeypatch.setattr(slow_lines, "SECONDS", {})  # here alone
    execute(composed(tmp_path, "name=whole", *options))
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
    heeded = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in heeded]
    with Stopping():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in heeded] == before


def test_a_sweep_in_this_process_is_told_of_a_late_signal() -> None:
    """It would begin its next job."""
    with pytest.raises(Stopped, match="SIGTERM"), at_once(), Stopping():
        os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_batches_a_signal_stops_at_once_and_nobody_takes_it_for_an_error() -> None:
    went_on = False
    with pytest.raises(Stopped, match="stopped by SIGHUP; "), at_once(), contextlib.suppress(Exception):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGHUP)
        went_on = True
    assert not went_on


def test_under_nohup_sighup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_once(), Stopping() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            stopping.heed()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_telling_is_no_second_signal() -> None:
    """A supervisor signals all processes of a sweep, and its launcher passes that on."""
    with pytest.raises(Stopped, match="SIGTERM after a finished batch"), Stopping() as stopping:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        tell(signal.SIGTERM)
        stopping.heed()


def test_a_run_whose_terminal_closes_finishes_its_batch(tmp_path: Path) -> None:
    """Nothing can be written there any more, and progress bars want to."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "run.py", *SLOW, "batch_size=1", f"out={tmp_path}", "name=x"],
        cwd=ROOT, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    samples = tmp_path / "x" / "samples.jsonl"
    wait_for(lambda: lines(samples) > 0)
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert 0 < lines(samples) < 40
    assert lines(samples) % 2 == 0
    assert len(outcomes(samples)) == lines(samples)


@pytest.mark.parametrize(
    ("launcher", "number", "goes_on"),
    [
        ("local", signal.SIGTERM, False),
        ("local", signal.SIGHUP, False),
        ("local", signal.SIGINT, False),
        ("local", signal.SIGKILL, True),
        ("basic", signal.SIGTERM, True),
    ],
)
def test_a_sweep_that_is_stopped_or_killed_leaves_nobody_behind_and_goes_on(
    launcher: str, number: signal.Signals, goes_on: bool, tmp_path: Path
) -> None:
    """goes_on: whether it is launched again, which takes its time."""
    jobs = 2 if launcher == "local" else 1  # at work at the same time
    command = [sys.executable, "run.py", "-m", f"launcher={launcher}", "seed=0,1", *SLOW, "batch_size=1", f"out={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: sum(lines(file) > 0 for file in tmp_path.glob("*/samples.jsonl")) == jobs)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == (2 if launcher == "local" else 0)

    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, printed
        assert re.findall(r"^ +\d+  (\w+)", printed, re.MULTILINE) == (["stopped"] * jobs + ["missing"])[:2]
        assert not any(member.is_running() for member in family), "they were waited for"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []

    (sweep,) = (tmp_path / ".sweeps").iterdir()
    noted = [json.loads(file.read_text()) for file in sweep.glob("jobs/*/outcome.json")]
    assert [outcome["state"] for outcome in noted] == ["stopped"] * jobs
    assert all("after a finished batch" in outcome["reason"] for outcome in noted)
    samples = [Path(outcome["folder"]) / "samples.jsonl" for outcome in noted]
    before = [file.read_bytes() for file in samples]
    assert all(0 < whole.count(b"\n") < 40 and whole.count(b"\n") % 2 == 0 and whole.endswith(b"\n") for whole in before)

    if not goes_on:
        return
    fast = ENVIRONMENT | {"SLOW_LINES": "0"}
    again = [sys.executable, "-m", "mikv.sweep", "rerun", str(sweep)]
    done = subprocess.run(again, cwd=ROOT, env=fast, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^ +\d+  (\w+)", done.stdout, re.MULTILINE) == ["finished", "finished"]
    for file, whole in zip(samples, before, strict=True):
        assert file.read_bytes().startswith(whole)
        assert len(outcomes(file)) == 40
