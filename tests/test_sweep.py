"""Sweeps without a cluster: the local launchers for real, Slurm's command lines, and how a job's state is judged."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from joblib import cpu_count

from mikv.config import CONF
from mikv.stopping import Stopped, Stopping
from mikv.sweep import queue
from mikv.sweep.__main__ import main as rerun
from mikv.sweep.folder import Outcome, Submitted, SweepError, SweepFolder, note_outcome
from mikv.sweep.job import noted
from mikv.sweep.launchers import Basic, Local, Slurm, Task
from mikv.sweep.process import JobProcess
from mikv.sweep.status import status

TINY = ["model=tiny-random", "task.limit=4", "task.max_new_tokens=4", "model.max_tokens=1500"]


def run(*command: str, status: int = 0, path: str = "") -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), "PATH": path + os.environ["PATH"]}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def folder_of(printed: str) -> Path:
    return Path(re.findall(r"follow +python -m mikv\.sweep status (\S+)", printed)[0])


def states(printed: str) -> list[str]:
    return re.findall(r"^ +\d+  (\w+)", printed, re.MULTILINE)


# --- for real ---


@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_failing_job_keeps_no_other_from_running_and_a_rerun_does_what_is_missing(launcher: str, tmp_path: Path) -> None:
    """The failing one comes first."""
    printed = run("run.py", "-m", f"launcher={launcher}", "task.lines=500,2,3", *TINY, f"out={tmp_path}", status=1)
    assert "3 of 3 jobs, " in printed
    assert states(printed) == ["failed", "finished", "finished"]
    assert "4 of 4 samples can't be asked of tiny-random" in printed
    sweep = folder_of(printed)
    assert str(sweep / "logs") in printed or launcher == "basic"
    assert f"to submit what is missing: python -m mikv.sweep rerun {sweep}" in printed
    assert "lines: 3" in (sweep / "jobs" / "2" / "config.yaml").read_text()

    gone = Path(json.loads((sweep / "jobs" / "1" / "outcome.json").read_text())["folder"])
    (gone / "summary.jsonl").unlink()
    assert states(run("-m", "mikv.sweep", "status", str(sweep))) == ["failed", "missing", "finished"]
    again = run("-m", "mikv.sweep", "rerun", str(sweep), status=1)
    assert "2 of 3 jobs, " in again
    assert states(again) == ["failed", "finished", "finished"]
    assert (gone / "summary.jsonl").exists()


def test_local_jobs_run_at_once_and_one_that_is_killed_is_found_dead(tmp_path: Path) -> None:
    command = ["-m", "launcher=local", "task.lines=4,5", "task._target_=slow_lines.SlowLines", *TINY, "task.limit=100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    process = subprocess.Popen(
        [sys.executable, "run.py", *command, f"out={tmp_path}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    sweep = SweepFolder(folder_of("".join(process.stdout.readline() for _ in range(3))))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*/samples.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [job.state for job in status(sweep)] == ["running", "running"]
    outcome = sweep.outcome(0)
    assert outcome is not None
    os.kill(outcome.process, signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert states(printed) == ["failed", "finished"]
    assert re.search(rf"process {outcome.process} on .+ is gone; its log ends: ", printed)


def test_an_unknown_error_is_a_failure_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    """Hydra hands errors back as values; the job would pass for completed."""
    sweep = SweepFolder(tmp_path)
    sweep.plan([], [["a=1"]])
    with pytest.raises(SystemExit, match="1"), noted(sweep, 0, "a: 1\n"):
        raise KeyError("what")
    outcome = json.loads((tmp_path / "jobs" / "0" / "outcome.json").read_text())
    assert (outcome["state"], outcome["reason"]) == ("failed", "KeyError: 'what'")


@pytest.mark.parametrize(("code", "state"), [(-1, "stopped"), (3, "failed")])
def test_a_job_that_submitit_requeued_while_nobody_heeded_the_signal_has_not_failed(
    tmp_path: Path, code: int, state: str
) -> None:
    """A time limit while weights are loaded or a plot is drawn: submitit's handler leaves with -1, and the job comes again."""
    sweep = SweepFolder(tmp_path)
    sweep.plan([], [["a=1"]])
    with pytest.raises(SystemExit), noted(sweep, 0, "a: 1\n"):
        raise SystemExit(code)
    assert json.loads((tmp_path / "jobs" / "0" / "outcome.json").read_text())["state"] == state


def test_a_launcher_without_a_sweep_is_refused() -> None:
    assert "launcher=... launches sweeps: add -m" in run("run.py", "launcher=slurm", *TINY, status=2)


def test_status_of_no_sweep_names_one_that_is_near(tmp_path: Path) -> None:
    SweepFolder(tmp_path / ".sweeps" / "now").plan(["-m"], [["a=1"]])
    assert f"did you mean {tmp_path}/.sweeps/now?" in run("-m", "mikv.sweep", "status", str(tmp_path), status=2)


def test_the_folder_of_other_jobs_is_refused(tmp_path: Path) -> None:
    SweepFolder(tmp_path).plan(["-m", "a=1,2"], [["a=1"], ["a=2"]])
    SweepFolder(tmp_path).plan(["-m", "launcher=slurm", "a=1,2"], [["a=1"], ["a=2"]])
    assert SweepFolder(tmp_path).command() == ["-m", "a=1,2"]
    with pytest.raises(SweepError, match="a sweep of other jobs"):
        SweepFolder(tmp_path).plan([], [["a=1"]])


def test_a_rerun_becomes_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between them a process that a signal ends alone would leave the launcher and its jobs behind."""
    SweepFolder(tmp_path).plan(["-m", "launcher=local", "a=1"], [["a=1"]])
    monkeypatch.setattr(sys, "argv", ["mikv.sweep", "rerun", str(tmp_path), "launcher=basic"])
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    rerun()
    assert became == [[sys.executable, str(ROOT / "run.py"), "-m", "a=1", "launcher=basic", f"hydra.sweep.dir='{tmp_path}'"]]


# --- processes of launcher=local ---


def job_process(call: Callable[[], object], folder: Path, grace_s: float = 30) -> JobProcess:
    """A job; `call` is a function within a test, so that it is pickled with all that it is."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return JobProcess(call, folder / "call.pkl", folder / "log", environment, grace_s)


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(file: Path) -> list[int]:
    """Of the process numbers in a file those that are alive."""
    numbers = [int(word) for word in file.read_text().split()]
    return [n for n in numbers if psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("how", ["ends", "stopped", "killed", "hangs", "hangs, launcher gone"])
def test_a_job_leaves_no_process_behind(how: str, tmp_path: Path) -> None:
    """Neither itself nor what it started, in whichever session; of one that was killed by others, those of its group."""

    def call() -> None:
        import subprocess
        import time

        from mikv.stopping import Stopping

        children = [subprocess.Popen(["sleep", "600"])]
        if how != "killed":
            children.append(subprocess.Popen(["sleep", "600"], start_new_session=True))
        (tmp_path / "new").write_text(" ".join(str(child.pid) for child in children))
        (tmp_path / "new").rename(tmp_path / "children")
        with Stopping() as stopping:
            while how != "ends":
                time.sleep(0.05)
                if how == "stopped":
                    stopping.heed()

    job = job_process(call, tmp_path, grace_s=1 if how == "hangs, launcher gone" else 600)
    wait_for((tmp_path / "children").exists)
    started = [job.id, *alive(tmp_path / "children")]
    if how in ("stopped", "hangs, launcher gone"):
        job.stop()
    if how == "killed":
        os.kill(job.id, signal.SIGKILL)
    if how == "hangs":
        job.kill()
    wait_for(job.ended)
    (tmp_path / "children").write_text(" ".join(map(str, started)))
    wait_for(lambda: alive(tmp_path / "children") == [])
    assert ("SIGTERM: stopping after this batch" in (tmp_path / "log").read_text()) == (
        "launcher gone" in how or how == "stopped"
    )


@pytest.mark.parametrize(("grace_s", "signals"), [(1, 1), (600, 2)])
def test_jobs_that_take_too_long_to_stop_are_killed(grace_s: int, signals: int, tmp_path: Path) -> None:
    """After a while, even one that can't end itself; or with the second signal."""

    def call() -> None:
        import os
        import signal
        import time

        from mikv.stopping import Stopping

        with Stopping():
            (tmp_path / "begun").touch()
            if signals == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)

    sweep = SweepFolder(tmp_path)
    sweep.plan([], [["a=1"]])
    sweep.forget(0)

    def told() -> None:
        wait_for((tmp_path / "begun").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        if signals == 2:
            (log,) = sweep.logs.iterdir()
            wait_for(lambda: "stopping after this batch" in log.read_text())
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=told).start()
    with pytest.raises(Stopped, match="SIGTERM"):
        Local(grace_s=grace_s, gpus=0).launch(sweep, [Task(0, print, (), call)])
    submitted = sweep.submitted(0)
    assert submitted is not None
    assert not psutil.pid_exists(int(submitted.id))


@pytest.mark.parametrize("when", ["before batches", "after the last batch"])
def test_one_after_the_other_no_job_begins_after_a_signal(when: str, tmp_path: Path) -> None:
    begun = []

    def here(number: int) -> None:
        begun.append(number)
        with nullcontext() if when == "before batches" else Stopping():
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM"):
        Basic().launch(SweepFolder(tmp_path), [Task(n, print, (), partial(here, n)) for n in range(2)])
    assert begun == [0]


# --- threads ---


ALL = str(cpu_count())


@pytest.mark.parametrize(
    ("bound", "jobs", "threads", "environment", "wanted"),
    [
        (False, 1, None, {}, {"OMP_NUM_THREADS": ALL, "MKL_NUM_THREADS": ALL}),
        (True, 1, None, {}, {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
        (False, cpu_count(), None, {}, {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
        (False, 999, None, {}, {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
        (False, 1, None, {"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": None}),
        (False, 1, None, {"MKL_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": ALL, "MKL_NUM_THREADS": "3"}),
        (False, 1, 5, {"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "5"}),
    ],
)
def test_local_jobs_share_the_cores(
    bound: bool,
    jobs: int,
    threads: int | None,
    environment: dict[str, str],
    wanted: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bound: this process may use a single core."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def call() -> None:
        import json
        import os

        (tmp_path / "environment").write_text(json.dumps(dict(os.environ)))

    sweep, before = SweepFolder(tmp_path), os.sched_getaffinity(0)
    sweep.plan([], [["a=1"]])
    sweep.forget(0)
    os.sched_setaffinity(0, {min(before)} if bound else before)
    try:
        launcher = Local(jobs_at_once=jobs, threads=threads, gpus=0)
        each = wanted["OMP_NUM_THREADS"]
        assert str(launcher) == f"{jobs} at once on this machine, {each} thread{'' if each == '1' else 's'} each"
        launcher.launch(sweep, [Task(0, print, (), call)])
    finally:
        os.sched_setaffinity(0, before)
    given = json.loads((tmp_path / "environment").read_text())
    assert {name: given.get(name) for name in wanted} == wanted


def test_torch_takes_no_more_threads_than_its_share(tmp_path: Path) -> None:
    """What the variables are for."""

    def call() -> None:
        import torch

        print("threads:", torch.get_num_threads())

    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= Local(threads=1).variables() | {"PYTHONPATH": str(ROOT)}
    job = JobProcess(call, tmp_path / "call.pkl", tmp_path / "log", environment, 30)
    wait_for(job.ended, 120)
    assert (tmp_path / "log").read_text() == "threads: 1\n"


def test_slurm_jobs_have_as_many_threads_as_cpus_unless_the_user_says_otherwise(no_slurm: str, tmp_path: Path) -> None:
    run("run.py", "-m", "launcher=slurm", "launcher.cpus=6", "seed=0", *TINY, f"out={tmp_path}/runs", path=no_slurm)
    (script,) = tmp_path.glob("runs/.sweeps/*/logs/*_submission.sh")
    exports = "\n".join(line for line in script.read_text().splitlines() if line.startswith("export "))
    for set_before, threads in (("", "6 6"), ("OMP_NUM_THREADS=2", "2 2"), ("MKL_NUM_THREADS=3", "6 3")):
        shell = f"unset OMP_NUM_THREADS MKL_NUM_THREADS; {set_before}\n{exports}\necho $OMP_NUM_THREADS $MKL_NUM_THREADS"
        assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.strip() == threads


# --- Slurm's command lines ---


@pytest.fixture
def no_slurm(tmp_path: Path) -> str:
    """A PATH with an sbatch that takes everything, and a squeue that knows nothing."""
    for name, says in (("sbatch", "echo Submitted batch job 77"), ("srun", ""), ("squeue", ""), ("sacct", "exit 1")):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{says}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return f"{tmp_path}/bin:"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ["launcher=slurm"],
            ["array=0-1%2", "cpus-per-task=8", "gpus-per-node=1", "mem=64GB", "time=240", "requeue", "signal=USR2@120"],
        ),
        (
            ["launcher=slurm_a100", "launcher.account=lab", "launcher.qos=high", "+launcher.sbatch.mail-type=END"],
            ["constraint=a100", "mem=120GB", "time=720", "account=lab", "qos=high", "mail-type=END"],
        ),
        (["launcher=slurm_preemptible"], ["partition=preemptible", "time=60", "signal=USR2@60", "requeue"]),
        (["launcher=slurm", "launcher.requeue=false", "launcher.array_parallelism=1"], ["no-requeue", "array=0-1%1"]),
        (["launcher=slurm", "launcher.gpus=0", "launcher.timeout_min=5"], ["time=5"]),
    ],
)
def test_options_become_lines_for_sbatch(no_slurm: str, overrides: list[str], wanted: list[str], tmp_path: Path) -> None:
    setup = "launcher.setup=['module load cuda','export A=1']"
    printed = run("run.py", "-m", *overrides, "task.lines=2,3", setup, *TINY, f"out={tmp_path}/runs", path=no_slurm)
    sweep = folder_of(printed)
    (script,) = (sweep / "logs").glob("*_submission.sh")
    lines = script.read_text().splitlines()
    given = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert set(wanted) <= set(given)
    assert any(line.startswith("gpus-per-node") for line in given) == ("launcher.gpus=0" not in overrides)
    assert "\nmodule load cuda\nexport A=1\n" in script.read_text()
    # a step takes its CPUs from the job no more since Slurm 22.05
    assert any(line.startswith("srun ") and "--cpus-per-task=" in line for line in lines)
    assert SweepFolder(sweep).submitted(1) == Submitted(
        "slurm", "77_1", str(sweep.resolve() / "logs" / "77_1_0_log.out"), str(sweep.resolve() / "logs" / "77_1_0_log.err")
    )
    assert "2 missing" in run("-m", "mikv.sweep", "status", str(sweep), path=no_slurm)


def test_without_slurm_that_is_said(tmp_path: Path) -> None:
    if (Path("/usr/bin/srun")).exists():
        pytest.skip("there is a Slurm here")
    printed = run("run.py", "-m", "launcher=slurm", *TINY, f"out={tmp_path}", status=2)
    assert "error: Slurm took no job" in printed


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "launcher").glob("*.yaml")))
def test_every_launcher_explains_each_of_its_fields(name: str) -> None:
    for line in (CONF / "launcher" / f"{name}.yaml").read_text().splitlines():
        assert re.match(r"#|_target_|defaults:|  - |constraint: a100$|cpus: ", line) or "  # " in line, line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slurm(timeout_min=2, signal_delay_s=120), "told to stop as it starts"),
        (lambda: Slurm(gpus=-1), r"launcher\.gpus=-1: a whole number, at least 0"),
        (lambda: Slurm(mem_gb="64G"), r"launcher\.mem_gb=64G"),
        (lambda: Local(jobs_at_once=0), r"launcher\.jobs_at_once=0"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_local_jobs_never_share_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="needs 4 GPUs, and 3 are there"):
        Local(jobs_at_once=2, gpus=2, gpu_ids=[0, 1, 2]).launch(SweepFolder(tmp_path), [])


# --- states ---

HERE = socket.gethostname()
ENDED = 2**22 + 1  # above the largest process number of Linux


@pytest.mark.parametrize(
    ("outcome", "launcher", "known", "state", "reason"),
    [
        (None, None, {}, "missing", "never started"),
        (("finished", ""), None, {}, "missing", "its records are gone"),
        (("failed", "too long"), "slurm", {"7_0": "FAILED"}, "failed", "too long"),
        (("running", ""), None, {}, "failed", "is gone"),
        (("stopped", "interrupted"), "local", {}, "stopped", "interrupted"),
        (None, "slurm", {"7_0": "PENDING"}, "waiting", ""),
        (None, "slurm", {"7_0": "CONFIGURING"}, "waiting", ""),
        (None, "slurm", {"7_0": "CANCELLED"}, "failed", "cancelled before it started"),
        (None, "slurm", {}, "missing", "does not know job 7_0 any more, and it never started"),
        (("running", ""), "slurm", {"7_0": "RUNNING"}, "running", ""),
        (("running", ""), "slurm", {"7_0": "SIGNALING"}, "running", ""),
        (("running", ""), "slurm", {"7_0": "OUT_OF_MEMORY"}, "failed", "OUT_OF_MEMORY; its log ends: last words"),
        (("running", ""), "slurm", {"7_0": "COMPLETED"}, "failed", "COMPLETED; its log ends: last words"),
        (("running", ""), "slurm", {}, "failed", "does not know job 7_0 any more; its log ends: last words"),
        (("stopped", "by SIGUSR2"), "slurm", {"7_0": "PENDING"}, "waiting", "by SIGUSR2; requeued"),
        (("stopped", "by SIGTERM"), "slurm", {"7_0": "CANCELLED"}, "stopped", "CANCELLED: by SIGTERM"),
    ],
)
def test_the_state_of_a_job(
    outcome: tuple[str, str] | None,
    launcher: str | None,
    known: dict[str, str],
    state: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue, "states", lambda _: known)
    sweep = SweepFolder(tmp_path)
    sweep.plan([], [["task.lines=2"]])
    sweep.forget(0)
    (tmp_path / "log").write_text("first\nlast words\n\r 99%\rlast words\n")
    if outcome is not None:
        note_outcome(sweep.job(0), Outcome(outcome[0], HERE, ENDED, 0.0, outcome[1], str(tmp_path / "nowhere")))
    if launcher is not None:
        sweep.note_submitted(0, Submitted(launcher, "7_0" if launcher == "slurm" else str(ENDED), "", str(tmp_path / "log")))
    (job,) = status(sweep)
    assert job.state == state
    assert reason in job.reason
    assert bool(reason) == bool(job.reason)


def test_a_live_process_is_a_running_job(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.plan([], [["a=1"], ["a=2"]])
    note_outcome(sweep.job(0), Outcome("running", HERE, os.getpid(), 0.0))
    note_outcome(sweep.job(1), Outcome("running", "another-host", ENDED, 0.0))  # it can't be asked
    assert [job.state for job in status(sweep)] == ["running", "running"]
