"""A signal to stop waits until the batch is done and on the disk.

Schedulers announce the end of a job: Slurm sends SIGUSR2 some time before the limit (submitit asks for it; its handler requeues
the job), and SIGTERM on preemption and scancel. A terminal that closes sends SIGHUP. Handled at once, each would cost the batch
in flight.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

# Windows has SIGTERM alone
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR2") if hasattr(signal, name)]

_told = False
"""Whether a signal has come to this process, for `tell`."""


class Stopped(BaseException):
    """The run was told to stop. Its records are complete so far.

    Like KeyboardInterrupt it is no Exception: `except Exception` does not catch it.
    """

    def __init__(self, number: int, when: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{when}; the same command goes on from here")
        self.number = number


class Stopping:
    """Use as a context manager around work that looks at `heed` between its batches.

    On leaving, the handler that the signal had before is called: submitit's handler then requeues the job and ends the
    process, a sweep in this process does not begin its next job. A second signal does not wait any more (Slurm sends SIGTERM
    when the limit is reached, and SIGKILL soon after). What was ignored on entry (SIGHUP under nohup) stays ignored.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._caught: int | None = None

    def __enter__(self) -> Stopping:
        self._before = _handle(self._catch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        _restore(self._before)
        if self._caught is not None and callable(handler := self._before.get(self._caught)):
            handler(self._caught, None)

    def heed(self) -> None:
        """Call between batches, when all that is computed is on the disk.

        Raises:
            Stopped: a signal came.
        """
        if self._caught is not None:
            raise Stopped(self._caught, " after a finished batch")

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        if self._caught is not None:
            raise Stopped(self._caught)
        self._caught = number
        _note(number)
        with contextlib.suppress(OSError):  # not print: the signal may have come while it was writing
            os.write(1, f"\n{signal.Signals(number).name}: stopping after this batch\n".encode())


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """In here a signal raises Stopped wherever the program is, but in `Stopping`: outside of batches nothing is in flight."""
    before = _handle(_stop)
    try:
        yield
    finally:
        _restore(before)


def tell(number: int) -> None:
    """Send this process a signal, from another of its threads; where one came already, no second one."""
    main = threading.main_thread().ident
    if not _told and main is not None:
        signal.pthread_kill(main, number)  # to that thread: a call in which it waits is cut short


def _stop(number: int, _frame: FrameType | None) -> None:
    _note(number)
    if not isinstance(sys.exception(), Stopped):  # else it is on its way already
        raise Stopped(number)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let `handler` have the signals that are not ignored. Returns the handlers that they had before."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        return {}
    heeded = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heeded}


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _note(number: int) -> None:
    """Remember that a signal came; after SIGHUP, let go of the terminal if it is closed: whatever is written there is an
    error, and the next step of a progress bar would end the batch."""
    global _told
    _told = True
    if number != getattr(signal, "SIGHUP", None):
        return
    with open(os.devnull, "r+b") as nowhere:
        for descriptor in (0, 1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                    os.dup2(nowhere.fileno(), descriptor)
