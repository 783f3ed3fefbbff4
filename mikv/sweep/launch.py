"""Launch the jobs of a sweep that are not done yet, and say what was launched and how to follow it.

The only module that knows Hydra's launching. What is pickled for submitit is hydra-submitit-launcher's own launcher object: it
composes the job's configuration where it runs, and gives submitit the `checkpoint` that it needs to requeue. Without submitit
Hydra's own basic launcher does it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import filter_overrides
from omegaconf import DictConfig

from mikv.cli import explained
from mikv.config import ConfigError, refuse_secrets
from mikv.config import launcher as configured
from mikv.stopping import Stopped
from mikv.sweep.folder import SweepError, SweepFolder
from mikv.sweep.launchers import Launcher, Task
from mikv.sweep.overview import print_overview
from mikv.sweep.status import TO_DO, status

ROOT = Path(__file__).parents[2]


def refuse(config: DictConfig) -> None:
    """Before anything of a sweep is written: end the program if its configuration holds a secret."""
    with explained():
        refuse_secrets(config)


def launch(context: Any, function: Any, config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Launch what of the jobs is not finished or at work: of a new sweep all, of one that is launched again the rest.

    Args:
        context, function: of Hydra's launcher plugin.
        config: of the sweep.
        jobs: overrides of each job.

    Raises:
        SystemExit: 1 if a job failed (where the launcher waits for the end), 2 if nothing could be launched, 128 and the number
            of a signal that stopped the sweep.
    """
    code = 0
    try:
        launcher: Launcher = configured(config)
        sweep = SweepFolder(Path(str(config.hydra.sweep.dir)))
        sweep.plan(sys.argv[1:], [[o for o in filter_overrides(list(job)) if not _of_launcher(o)] for job in jobs])
        todo = [job.number for job in status(sweep) if job.state in TO_DO]
        for number in todo:
            sweep.forget(number)
        print(f"{len(todo)} of {len(jobs)} jobs, {launcher}")
        print(f"logs    {sweep.logs if launcher.logs else 'are printed here'}")
        print(f"follow  python -m mikv.sweep status {sweep.path}", flush=True)
        if todo:
            _make_importable()
            tasks = _tasks(context, function, config, {number: list(jobs[number]) for number in todo})
            code = _launched(launcher, sweep, tasks)
        ended = status(sweep)
        if launcher.waits:
            print_overview(sweep, ended)
    except (ConfigError, SweepError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if launcher.waits and (code or any(job.state != "finished" for job in ended)):
        raise SystemExit(code or 1)


def _launched(launcher: Launcher, sweep: SweepFolder, tasks: Sequence[Task]) -> int:
    """Let the launcher do its work. Returns the status for the shell: 0, or 128 and the number of the signal that ended it."""
    try:
        launcher.launch(sweep, tasks)
    except Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as end:  # a job in this process was stopped
        return end.code if isinstance(end.code, int) else 1
    return 0


def _tasks(context: Any, function: Any, config: DictConfig, jobs: dict[int, list[str]]) -> list[Task]:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    there, here = SlurmLauncher(), BasicLauncher()
    for stock in (there, here):
        stock.setup(hydra_context=context, task_function=function, config=config)
    state = Singleton.get_state()
    return [
        Task(
            number,
            there,
            (overrides, "hydra.sweep.dir", number, f"job_{number}", state),
            partial(_here, here, overrides, number, state),
        )
        for number, overrides in jobs.items()
    ]


def _here(launcher: Any, overrides: list[str], number: int, state: Any) -> None:
    """Run a job in this process, which may be another than the one that launches."""
    Singleton.set_state(state)
    launcher.launch([overrides], initial_job_idx=number)


def _of_launcher(override: str) -> bool:
    return override.lstrip("+~").partition("=")[0].partition(".")[0] == "launcher"


def _make_importable() -> None:
    """Jobs start in the same folder with the same environment, but run.py's own folder is not on their path."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, path)])
