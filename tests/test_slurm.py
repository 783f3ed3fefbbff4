"""A real Slurm (scripts/slurm_start.sh): arrays, failures, time limits, preemption, cancelled jobs, status and rerun."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slow_lines
from conftest import ROOT
from test_runner import assert_same, outcomes

from mikv.config import compose
from mikv.runner import execute

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]

TINY = ["model=tiny-random", "task.max_new_tokens=4", "task._target_=slow_lines.SlowLines", "task.limit=100", "batch_size=1"]
SMALL = ["launcher.cpus=1", "launcher.mem_gb=4"]


@pytest.fixture(scope="module")
def cluster() -> None:
    """Skips without a Slurm that answers; where MIKV_REQUIRE_SLURM is set (CI) that is a failure."""
    why = ""
    if shutil.which("sbatch") is None:
        why = "no sbatch here (Debian: apt-get install slurm-wlm munge)"
    elif subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode != 0:
        why = "no Slurm answers: start one with scripts/slurm_start.sh and source the env.sh that it names"
    if why and os.environ.get("MIKV_REQUIRE_SLURM"):
        pytest.fail(why)
    if why:
        pytest.skip(why)


def environment() -> dict[str, str]:
    """Without what a job of another Slurm, in which the tests may run, has set."""
    foreign = ("SBATCH_", "SLURM_JOB", "SLURM_ARRAY", "SUBMITIT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*command: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def submitted(*overrides: str) -> Path:
    """Submit a sweep; its folder."""
    printed = run("run.py", "-m", *TINY, *SMALL, *overrides)
    print(printed)
    return Path(re.findall(r"python -m mikv\.sweep status (\S+)", printed)[0])


def states(sweep: Path) -> list[str]:
    return re.findall(r"^ +\d+  (\w+)", run("-m", "mikv.sweep", "status", str(sweep)), re.MULTILINE)


def wait(for_what: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < deadline, subprocess.run(["squeue", "-a", "-t", "all"], capture_output=True, text=True).stdout
        time.sleep(0.5)


def wait_for_end(sweep: Path, *wanted: str) -> None:
    """Until the jobs have these states; an unexpected failure is an end, too."""

    def ended() -> bool:
        found = states(sweep)
        wrong = any(
            state in ("stopped", "failed", "missing") and state != want for state, want in zip(found, wanted, strict=True)
        )
        assert not wrong, run("-m", "mikv.sweep", "status", str(sweep))
        return found == list(wanted)

    wait(ended)


def samples(sweep: Path, job: int) -> Path:
    outcome = json.loads((sweep / "jobs" / str(job) / "outcome.json").read_text())
    return Path(outcome["folder"]) / "samples.jsonl"


def begun(sweep: Path, job: int) -> bool:
    """Whether a job has written records."""
    outcome = sweep / "jobs" / str(job) / "outcome.json"
    return outcome.exists() and json.loads(outcome.read_text())["folder"] is not None and samples(sweep, job).exists()


def job_id(sweep: Path, job: int) -> str:
    return json.loads((sweep / "jobs" / str(job) / "submitted.json").read_text())["id"]


def log(sweep: Path, job: int) -> str:
    return "".join(file.read_text() for file in sorted((sweep / "logs").glob(f"{job_id(sweep, job)}_0_log.*")))


def test_a_sweep_with_a_failure_a_time_limit_and_a_cancelled_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four jobs of one array: 0 is done soon, 1 lasts longer than its time limit of a minute, 2 is cancelled, 3 fails."""
    options = [f"out={tmp_path}/runs", "model.max_tokens=1500", "launcher.timeout_min=1", "launcher.signal_delay_s=1"]
    sweep = submitted("launcher=slurm", "task.lines=2,3,4,500", *options)
    array = job_id(sweep, 0).removesuffix("_0")
    assert [job_id(sweep, job) for job in range(4)] == [f"{array}_{task}" for task in range(4)]
    (script,) = (sweep / "logs").glob("*_submission.sh")
    assert "#SBATCH --array=0-3%4" in script.read_text()
    assert set(states(sweep)) <= {"running", "waiting"}

    wait(lambda: begun(sweep, 2))
    subprocess.run(["scancel", job_id(sweep, 2)], check=True, timeout=60)
    wait(lambda: states(sweep)[2:] == ["stopped", "failed"], 60)
    told = run("-m", "mikv.sweep", "status", str(sweep))
    assert re.search(r"CANCELLED: stopped by SIG\w+ after a finished batch", told), told
    assert "100 of 100 samples can't be asked of tiny-random" in told
    cancelled = samples(sweep, 2).read_text()
    assert cancelled.endswith("\n")

    wait_for_end(sweep, "finished", "finished", "stopped", "failed")
    assert "this job is timed-out" in log(sweep, 1)
    assert "Requeued job" in log(sweep, 1)
    assert "going on, " in log(sweep, 1)

    again = run("-m", "mikv.sweep", "rerun", str(sweep), "launcher.timeout_min=10")
    assert "2 of 4 jobs, submitted to Slurm" in again
    wait_for_end(sweep, "finished", "finished", "finished", "failed")
    assert samples(sweep, 2).read_text().startswith(cancelled)

    monkeypatch.setattr(slow_lines, "SECONDS", {})
    for job, lines in ((1, 3), (2, 4)):
        whole = compose(*TINY, f"task.lines={lines}", "model.max_tokens=1500", f"out={tmp_path}/whole")
        execute(whole)
        assert_same(outcomes(whole.folder() / "samples.jsonl"), outcomes(samples(sweep, job)))


def test_a_preempted_job_is_requeued_by_slurm_and_goes_on(tmp_path: Path) -> None:
    sweep = submitted("launcher=slurm_preemptible", "task.lines=4", f"out={tmp_path}/runs")
    wait(lambda: begun(sweep, 0))
    urgent = ["srun", "--partition=urgent", "--nodes=2", "--exclusive", "--time=1", "true"]
    subprocess.run(urgent, check=True, timeout=90, capture_output=True, env=environment())
    wait(lambda: "going on, " in log(sweep, 0))
    wait_for_end(sweep, "finished")
    assert "stopping after this batch" in log(sweep, 0)
    found = outcomes(samples(sweep, 0))
    assert len(found) == 2 * 100


def test_a_signalled_job_requeues_itself(tmp_path: Path) -> None:
    """What submitit asks Slurm to send before the time limit, and some clusters send before preemption."""
    sweep = submitted("launcher=slurm", "task.lines=4", f"out={tmp_path}/runs")
    wait(lambda: begun(sweep, 0))
    subprocess.run(["scancel", "--signal=USR2", job_id(sweep, 0)], check=True, timeout=60)
    wait(lambda: states(sweep) == ["waiting"], 30)
    assert re.search("stopped by SIGUSR2 after a finished batch.*; requeued", run("-m", "mikv.sweep", "status", str(sweep)))
    wait_for_end(sweep, "finished")
    assert "this job is preempted" in log(sweep, 0)
    assert "going on, " in log(sweep, 0)
    assert len(outcomes(samples(sweep, 0))) == 2 * 100


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("launcher.partition=nowhere", "invalid partition specified: nowhere"),
        ("launcher.gpus=99", "Requested node configuration is not available"),
        ("launcher.timeout_min=99999", "Requested time limit is invalid"),
    ],
)
def test_what_slurm_refuses_is_said_in_its_words(tmp_path: Path, option: str, said: str) -> None:
    arguments = ["-m", "launcher=slurm", *TINY, *SMALL, option, f"out={tmp_path}"]
    printed = run("run.py", *arguments, status=2)
    assert "error: Slurm took no job" in printed
    assert said in printed
    assert "Traceback" not in printed
