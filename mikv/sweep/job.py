"""A job of a sweep notes its outcome in its folder: exit codes and logs tell it only in part."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mikv.stopping import Stopped
from mikv.sweep.folder import Outcome, SweepFolder, note_outcome

# submitit's handler requeues the job and then leaves so; where no other handler is installed (while weights are loaded, a plot
# drawn) that is all there is to see of it.
_SUBMITIT_REQUEUED = -1


@contextmanager
def noted(sweep: SweepFolder, number: int, config: str) -> Iterator[Callable[[Path], None]]:
    """Say which job of the sweep begins; note start, end and failure of what happens inside.

    Args:
        number: of the job.
        config: its whole configuration, as YAML; kept there.

    Yields:
        To be told the folder of the run's records.

    Raises:
        SystemExit: status 1 instead of an unknown error, whose traceback is printed: Hydra would hand it back as a value, and
            Slurm would call the job completed. What ends the program otherwise passes.
    """
    job, names = sweep.job(number), sweep.differences()
    print(f"\njob {number} of {len(names)}: {' '.join(names[number])}", flush=True)
    outcome = Outcome("running", socket.gethostname(), os.getpid(), time.time())

    def folder(path: Path) -> None:
        nonlocal outcome
        outcome = replace(outcome, folder=str(path.resolve()))
        note_outcome(job, outcome)

    note_outcome(job, outcome)
    (job / "config.yaml").write_text(config, encoding="utf-8")
    try:
        yield folder
    except BaseException as error:
        state, reason = _reason(error)
        note_outcome(job, replace(outcome, state=state, reason=reason, ended=time.time()))
        if isinstance(error, Exception):
            traceback.print_exc()
            raise SystemExit(1) from error
        raise
    note_outcome(job, replace(outcome, state="finished", ended=time.time()))


def _reason(error: BaseException) -> tuple[str, str]:
    cause = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ is not None else error
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == 130):
        return "stopped", "interrupted"
    # submitit's handler leaves by SystemExit while Stopped is handled
    if isinstance(cause, Stopped) or isinstance(cause.__context__, Stopped):
        return "stopped", str(cause if isinstance(cause, Stopped) else cause.__context__)
    if isinstance(cause, SystemExit) and cause.code == _SUBMITIT_REQUEUED:
        return "stopped", "told to stop before or after its batches"
    if isinstance(cause, SystemExit):
        return "failed", f"the program ended itself with status {cause.code}"
    message = str(cause).strip() or type(cause).__name__
    expected = isinstance(error, SystemExit)  # mikv.cli.explained has told the user
    return "failed", message if expected else f"{type(cause).__name__}: {message}"
