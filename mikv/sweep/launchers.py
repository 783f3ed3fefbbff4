"""Where the jobs of a sweep run. A YAML of conf/launcher is a constructor call of one of these."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mikv.stopping import Stopped, Stopping, at_once
from mikv.sweep.folder import Submitted, SweepError, SweepFolder
from mikv.sweep.process import JobProcess

# Each library's pool of threads takes all cores of the machine, unless its variable says otherwise.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Task:
    """A job to launch: its number in the sweep, what submitit calls (picklable, with `checkpoint`) and with which arguments,
    and how to run it without submitit, here or in another process (picklable by cloudpickle)."""

    number: int
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    here: Callable[[], Any]


class Launcher(Protocol):
    """`str` of it: how it runs jobs, for the user."""

    waits: bool
    """Whether `launch` returns when all jobs have ended, or when they are submitted."""
    logs: bool
    """Whether each job's output goes to a file in the sweep's logs."""

    def launch(self, sweep: SweepFolder, tasks: Sequence[Task]) -> None: ...


@dataclass(frozen=True)
class Basic:
    """One job after the other, in this process. One that fails does not keep the next from running; a signal does."""

    waits, logs = True, False

    def __str__(self) -> str:
        return "one after the other"

    def launch(self, sweep: SweepFolder, tasks: Sequence[Task]) -> None:  # noqa: ARG002
        with at_once():
            for task in tasks:
                try:
                    task.here()
                except SystemExit as end:
                    if end.code not in (1, 2):  # not a failure of the job: somebody stopped the sweep
                        raise


@dataclass(frozen=True)
class Local:
    """Processes on this machine, several at once. They end before the launcher does, or, where it is killed, soon after.

    Args:
        jobs_at_once: processes that run at the same time.
        threads: CPU threads of each job; null = the cores that this process may use, shared by the jobs that run at the same
            time, or what OMP_NUM_THREADS says where it is set.
        gpus: GPUs of each job; jobs that run at the same time never share one. 0, or a machine without: the CPU.
        gpu_ids: GPUs of this machine that may be used; null = those that nvidia-smi lists (or CUDA_VISIBLE_DEVICES allows).
        grace_s: seconds in which jobs that are told to stop may finish their batch, before they are killed.
    """

    jobs_at_once: int = 2
    threads: int | None = None
    gpus: int = 1
    gpu_ids: Sequence[int] | None = None
    grace_s: int = 120
    waits, logs = True, True

    def __str__(self) -> str:
        threads = (os.environ | self.variables())["OMP_NUM_THREADS"]
        return f"{self.jobs_at_once} at once on this machine, {threads} {'thread' if threads == '1' else 'threads'} each"

    def __post_init__(self) -> None:
        _at_least(1, jobs_at_once=self.jobs_at_once, **({} if self.threads is None else {"threads": self.threads}))
        _at_least(0, gpus=self.gpus, grace_s=self.grace_s)

    def variables(self) -> dict[str, str]:
        """Environment variables that give each job its share of the cores; what the user has set stays, but for `threads`."""
        from joblib import cpu_count  # knows affinity and the quotas of containers

        if self.threads is not None:
            return dict.fromkeys(_THREADS, str(self.threads))
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        share = max(1, cpu_count() // self.jobs_at_once)
        return {name: str(share) for name in _THREADS if name not in os.environ}

    def launch(self, sweep: SweepFolder, tasks: Sequence[Task]) -> None:
        there = _gpus_here() if self.gpu_ids is None else list(self.gpu_ids)
        if there and self.jobs_at_once * self.gpus > len(there):
            raise SweepError(
                f"launcher.jobs_at_once={self.jobs_at_once} with launcher.gpus={self.gpus} needs "
                f"{self.jobs_at_once * self.gpus} GPUs, and {len(there)} are there: fewer jobs at once, or launcher.gpus=0"
            )
        environment = os.environ | self.variables()
        sweep.logs.mkdir(parents=True, exist_ok=True)
        running: list[JobProcess | None] = [None] * self.jobs_at_once
        with Stopping() as stopping:
            try:
                for task in tasks:
                    place = _free(running, stopping)
                    mine = there[place * self.gpus : (place + 1) * self.gpus] if there else []
                    job = JobProcess(
                        task.here,
                        sweep.job(task.number) / "call.pkl",
                        log := sweep.logs / f"{task.number}_{os.getpid()}.log",  # a rerun keeps it
                        environment | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))},
                        self.grace_s,
                    )
                    running[place] = job
                    sweep.note_submitted(task.number, Submitted("local", str(job.id), str(log.resolve()), str(log.resolve())))
                while not all(job is None or job.ended() for job in running):
                    stopping.heed()
                    time.sleep(0.2)
            finally:
                self._end([job for job in running if job is not None and not job.ended()])

    def _end(self, jobs: Sequence[JobProcess]) -> None:
        """Tell jobs to stop, wait for them, and kill those that take too long; all of them, on being told again."""
        if not jobs:
            return
        print(f"{len(jobs)} jobs may finish their batch, in at most {self.grace_s} s; a second signal ends them", flush=True)
        try:
            for job in jobs:
                job.stop()
            deadline = time.monotonic() + self.grace_s
            while time.monotonic() < deadline and not all(job.ended() for job in jobs):
                time.sleep(0.1)
        except (Stopped, KeyboardInterrupt):
            pass
        finally:
            for job in jobs:
                job.kill()


@dataclass(frozen=True)
class Slurm:
    """Jobs of a Slurm cluster: one array per sweep. Fields: conf/launcher/slurm.yaml explains each with its unit."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = 1
    cpus: int = 8
    mem_gb: int = 64
    timeout_min: int = 240
    array_parallelism: int = 32
    setup: Sequence[str] = ()
    requeue: bool = True
    max_timeouts: int = 100
    signal_delay_s: int = 120
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    waits, logs = False, True

    def __str__(self) -> str:
        return (
            f"submitted to Slurm, at most {self.array_parallelism} at once; each has {self.gpus} GPU, {self.cpus} CPUs, "
            f"{self.mem_gb} GB, {self.timeout_min} minutes"
        )

    def __post_init__(self) -> None:
        _at_least(0, gpus=self.gpus, max_timeouts=self.max_timeouts, signal_delay_s=self.signal_delay_s)
        _at_least(1, cpus=self.cpus, mem_gb=self.mem_gb, timeout_min=self.timeout_min, array_parallelism=self.array_parallelism)
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(
                f"launcher.signal_delay_s={self.signal_delay_s} is the whole of launcher.timeout_min={self.timeout_min}: "
                "every job would be told to stop as it starts"
            )

    def launch(self, sweep: SweepFolder, tasks: Sequence[Task]) -> None:
        import submitit
        from submitit.core.utils import FailedJobError

        overruling = sorted(name for name in os.environ if name.startswith("SBATCH_"))
        if overruling:
            print(f"note: {', '.join(overruling)} in the environment take precedence over the launcher's options")
        wanted = {
            "timeout_min": self.timeout_min,
            "cpus_per_task": self.cpus,
            "mem_gb": self.mem_gb,
            "gpus_per_node": self.gpus or None,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_setup": [*self.setup, *self._share()],
            "slurm_array_parallelism": self.array_parallelism,
            "slurm_signal_delay_s": self.signal_delay_s,
            # a step takes its CPUs from the job no more since Slurm 22.05: it would be bound to one
            "slurm_srun_args": [f"--cpus-per-task={self.cpus}"],
            # --requeue: also what Slurm itself ends (preemption, a node that dies) is started again
            "slurm_additional_parameters": {"requeue" if self.requeue else "no-requeue": True, **self.sbatch},
            "name": "mikv",
        }
        try:
            executor = submitit.AutoExecutor(
                folder=sweep.logs, cluster="slurm", slurm_max_num_timeout=self.max_timeouts if self.requeue else 0
            )
            executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
            jobs = executor.map_array(tasks[0].call, *zip(*(task.arguments for task in tasks), strict=True))
        except (RuntimeError, FailedJobError) as error:  # no sbatch here; or what sbatch itself says
            raise SweepError(f"Slurm took no job: {str(error).strip()}") from error
        for task, job in zip(tasks, jobs, strict=True):
            log, errors = (str(file.resolve()) for file in (job.paths.stdout, job.paths.stderr))
            sweep.note_submitted(task.number, Submitted("slurm", str(job.job_id), log, errors))

    def _share(self) -> list[str]:
        """Shell lines: as many threads as CPUs. Not as an option, as the user may have set them here, there, or in `setup`."""
        first, *others = _THREADS
        lines = [f"export {first}=${{{first}:-{self.cpus}}}"]
        return lines + [f"export {name}=${{{name}:-${first}}}" for name in others]


def _free(running: Sequence[JobProcess | None], stopping: Stopping) -> int:
    """The first place without a running job; waits for one.

    Raises:
        Stopped: the sweep was told to stop.
    """
    while True:
        stopping.heed()
        for place, job in enumerate(running):
            if job is None or job.ended():
                return place
        time.sleep(0.2)


def _gpus_here() -> list[int]:
    if (allowed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [int(gpu) for gpu in allowed.split(",") if gpu.isdigit()]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except OSError:
        return []
    return list(range(len(listed.stdout.splitlines()))) if listed.returncode == 0 else []


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"launcher.{name}={value}: a whole number, at least {least}")
