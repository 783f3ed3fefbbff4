"""A job of launcher=local as a process that does not outlive its launcher: both ends of the line between them.

The launcher holds a pipe and writes nothing into it. Where it closes it, or is gone (kill -9 included), the job reads the end:
it is told to stop, finishes its batch, and kills itself where that takes too long. That is the same on every POSIX system;
Linux's PR_SET_PDEATHSIG is not, and comes when the thread that started the job ends.

A job is a session of its own: a closed terminal and Ctrl-C reach the launcher alone, which tells all of its jobs, once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from mikv.stopping import Stopped, at_once, tell


class JobProcess:
    """Start a job.

    Args:
        call: what it does; picklable by cloudpickle.
        file: where `call` is left for it.
        log: file that its output is appended to.
        environment: its environment variables.
        grace_s: seconds in which it may finish its batch once the launcher is gone.
    """

    def __init__(self, call: Callable[[], Any], file: Path, log: Path, environment: Mapping[str, str], grace_s: float) -> None:
        import cloudpickle

        file.write_bytes(cloudpickle.dumps(call))
        theirs, self._line = os.pipe()
        command = [sys.executable, "-u", "-m", "mikv.sweep.process", str(file), str(theirs), str(grace_s)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                pass_fds=[theirs], start_new_session=True,
            )  # fmt: skip
        os.close(theirs)
        self._seen = psutil.Process(self._process.pid)
        self._stopped = False

    @property
    def id(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        """Whether it has. What it left in its process group (it may have been killed) is then killed."""
        if self._process.returncode is None and self._seen.status() == psutil.STATUS_ZOMBIE:
            self.kill()  # before it is waited for: until then its number can't be given to another process
        return self._process.returncode is not None

    def stop(self) -> None:
        """Tell it to stop after its batch."""
        if not self._stopped:
            self._stopped = True
            os.close(self._line)

    def kill(self) -> None:
        """Kill it with all that it started, and wait for its end."""
        if self._process.returncode is None:
            _kill_family(self._process.pid)
            self._process.wait()
        self.stop()


def main() -> None:
    file, line, grace_s = sys.argv[1:]
    with at_once():
        threading.Thread(target=_follow, args=(int(line), float(grace_s)), daemon=True).start()
        try:
            import cloudpickle

            cloudpickle.loads(Path(file).read_bytes())()
        except Stopped as stopped:
            raise SystemExit(128 + stopped.number) from stopped
        finally:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def _follow(line: int, grace_s: float) -> None:
    os.set_inheritable(line, False)
    os.read(line, 1)
    tell(signal.SIGTERM)
    time.sleep(grace_s)
    _kill_family(os.getpid())


def _kill_family(leader: int) -> None:
    """Kill a process, its process group, and its descendants of other groups; a group outlives its leader."""
    descendants: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(leader).children(recursive=True)
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the latter if all of them are dead
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    main()
