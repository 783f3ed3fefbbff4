"""What became of each job of a sweep: finished, running, waiting, stopped, failed or missing, and why."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mikv.sweep import queue
from mikv.sweep.folder import Outcome, Submitted, SweepFolder

STATES = ("finished", "running", "waiting", "stopped", "failed", "missing")
TO_DO = ("stopped", "failed", "missing")


@dataclass(frozen=True)
class Job:
    """number: within the sweep; overrides: what it runs; state: one of STATES; reason: of an end that is none; log: if any."""

    number: int
    overrides: Sequence[str]
    state: str
    reason: str = ""
    log: str = ""


def status(sweep: SweepFolder) -> list[Job]:
    """All jobs of a sweep.

    Raises:
        SweepError: no sweep. OSError: Slurm does not answer.
    """
    plan = sweep.jobs()
    submitted = {number: sweep.submitted(number) for number in range(len(plan))}
    known = queue.states({sub.id for sub in submitted.values() if sub is not None and sub.launcher == "slurm"})
    jobs = []
    for number, overrides in enumerate(plan):
        sub = submitted[number]
        state, reason = _judge(sweep.outcome(number), sub, known)
        jobs.append(Job(number, overrides, state, reason, "" if sub is None else sub.errors))
    return jobs


def _judge(outcome: Outcome | None, submitted: Submitted | None, known: dict[str, str]) -> tuple[str, str]:
    """State and reason, from what the job noted, how it was submitted and what Slurm knows."""
    if outcome is not None and outcome.state == "finished":
        if outcome.folder is not None and (Path(outcome.folder) / "summary.jsonl").exists():
            return "finished", ""
        return "missing", f"it had finished, but its records are gone from {outcome.folder}"
    if outcome is not None and outcome.state == "failed":
        return "failed", outcome.reason
    if submitted is not None and submitted.launcher == "slurm":
        return _judge_queued(outcome, submitted, known.get(submitted.id))
    if outcome is not None:
        if outcome.state == "stopped":
            return "stopped", outcome.reason
        if _alive(outcome.host, outcome.process):
            return "running", ""
        return "failed", _silent(submitted, f"process {outcome.process} on {outcome.host} is gone")
    if submitted is not None and _alive(socket.gethostname(), int(submitted.id)):
        return "running", ""
    return "missing", "never started"


def _judge_queued(outcome: Outcome | None, submitted: Submitted, state: str | None) -> tuple[str, str]:
    if state is None:
        if outcome is None:
            return "missing", f"Slurm does not know job {submitted.id} any more, and it never started"
        return "failed", _silent(submitted, f"Slurm does not know job {submitted.id} any more")
    if state in queue.WAITING:
        return "waiting", f"{outcome.reason}; requeued" if outcome is not None and outcome.state == "stopped" else ""
    if state not in queue.ENDED:
        return "running", ""
    if outcome is None:
        why = {"CANCELLED": "cancelled before it started"}.get(state, f"{state} before it started")
        return "failed", _silent(submitted, why)
    if outcome.state == "stopped":
        return "stopped", f"{state}: {outcome.reason}"
    return "failed", _silent(submitted, state)


def _alive(host: str, process: int) -> bool:
    """On another host it can't be seen; then it counts as alive, and its claim on the run's folder keeps others off."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _silent(submitted: Submitted | None, what: str) -> str:
    """A job that could not say why it ended: killed, out of memory, over its limit. The last line of its log may."""
    if submitted is None or not Path(submitted.errors).is_file():
        return what
    text = Path(submitted.errors).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{what}; its log ends: {lines[-1][:160]}" if lines else what


def print_jobs(sweep: SweepFolder, jobs: Sequence[Job]) -> None:
    """A line per job, and the reasons of failures."""
    for job, own in zip(jobs, sweep.differences(), strict=True):
        print(f"{job.number:>4}  {job.state:<9} {' '.join(own)}")
        if job.reason:
            print("\n".join(f"                {line}" for line in job.reason.splitlines()))
        if job.state == "failed" and job.log:
            print(f"                {job.log}")


def print_count(sweep: SweepFolder, jobs: Sequence[Job]) -> None:
    """How many jobs there are of each state, and what to do."""
    count = Counter(job.state for job in jobs)
    print(f"{len(jobs)} jobs: " + ", ".join(f"{count[state]} {state}" for state in STATES if count[state]))
    if any(count[state] for state in TO_DO):
        print(f"to submit what is missing: python -m mikv.sweep rerun {sweep.path}")
