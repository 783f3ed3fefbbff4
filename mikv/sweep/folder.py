"""The folder of one sweep: what was planned, what was submitted, and what became of each job.

    <out>/.sweeps/<time>/sweep.json              the command and each job's overrides
                         multirun.yaml           the configuration that all jobs share (Hydra's)
                         jobs/N/call.pkl         by launcher=local: what job N does
                         jobs/N/config.yaml      its whole configuration
                         jobs/N/submitted.json   by the launcher: its id and log
                         jobs/N/outcome.json     by the job itself: running, finished, failed or stopped, and why
                         logs/                   what the jobs print

Each file has one writer and is replaced as a whole. Records lie in the runs' own folders, beside .sweeps.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mikv.records import write_atomically


class SweepError(ValueError):
    """A sweep can't be read, or is another one; the message says what to do."""


@dataclass(frozen=True)
class Submitted:
    """id: of Slurm (13_0), or the process of a local job. log, errors: where its output goes."""

    launcher: str
    id: str
    log: str
    errors: str


@dataclass(frozen=True)
class Outcome:
    """What a job says of itself.

    state: running, finished, failed or stopped (by a signal; it goes on if it is requeued); reason: of failed and stopped;
    folder: of the run's records, as soon as it is known; host, process: where it runs; times: Unix seconds.
    """

    state: str
    host: str
    process: int
    started: float
    reason: str = ""
    folder: str | None = None
    ended: float | None = None


class SweepFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"

    def plan(self, command: Sequence[str], jobs: Sequence[Sequence[str]]) -> None:
        """Note what is to be done. Again with the same jobs: a rerun.

        Raises:
            SweepError: the folder is that of other jobs.
        """
        planned = [list(job) for job in jobs]
        if (self.path / "sweep.json").exists():
            if self.jobs() != planned:
                raise SweepError(f"{self.path} is the folder of a sweep of other jobs; leave hydra.sweep.dir as it is")
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "sweep.json", json.dumps({"command": list(command), "jobs": planned}, indent=1))

    def jobs(self) -> list[list[str]]:
        """Overrides of each job."""
        return self._plan()["jobs"]

    def differences(self) -> list[list[str]]:
        """Of each job the overrides that not all jobs have; of a single job all."""
        jobs = self.jobs()
        shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
        return [[override for override in job if override not in shared] for job in jobs]

    def command(self) -> list[str]:
        """What stood behind run.py."""
        return self._plan()["command"]

    def _plan(self) -> dict[str, list]:
        file = self.path / "sweep.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = sorted(str(other.parent) for other in self.path.glob("**/sweep.json"))
            hint = "; did you mean " + " or ".join(found[-3:]) + "?" if found else ": `python run.py -m ...` prints its folder"
            raise SweepError(f"{self.path} is no folder of a sweep{hint}") from None
        except (OSError, ValueError) as error:
            raise SweepError(f"{file} can't be read ({error})") from error

    def job(self, number: int) -> Path:
        return self.path / "jobs" / str(number)

    def submitted(self, number: int) -> Submitted | None:
        values = _read(self.job(number) / "submitted.json")
        return None if values is None else Submitted(**values)

    def outcome(self, number: int) -> Outcome | None:
        values = _read(self.job(number) / "outcome.json")
        return None if values is None else Outcome(**values)

    def forget(self, number: int) -> None:
        """Before a job is submitted: what was noted of an earlier attempt."""
        shutil.rmtree(self.job(number), ignore_errors=True)
        self.job(number).mkdir(parents=True)

    def note_submitted(self, number: int, submitted: Submitted) -> None:
        write_atomically(self.job(number) / "submitted.json", json.dumps(asdict(submitted)))


def note_outcome(job: Path, outcome: Outcome) -> None:
    job.mkdir(parents=True, exist_ok=True)
    write_atomically(job / "outcome.json", json.dumps(asdict(outcome)))


def _read(file: Path) -> dict | None:
    with contextlib.suppress(FileNotFoundError):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SweepError(f"{file} is damaged ({error}); remove it, and its job counts as missing") from error
    return None
