"""A signal to stop waits until the batch is done and on the disk.

Schedulers announce the end of a job: Slurm sends SIGUSR2 some time before the limit (submitit asks for it; its handler requeues
the job), and SIGTERM on preemption and scancel. Handled at once, either would cost the batch in flight.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]  # Windows has no SIGUSR2


class Stopped(RuntimeError):
    """The run was told to stop, and did so after a batch. Its records are complete so far."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after a finished batch; the same command goes on from here")
        self.number = number


class Stopping:
    """Use as a context manager around work that looks at `heed` between its batches.

    On leaving with Stopped, whoever handled the signal before is called: submitit's handler then requeues the job and ends the
    process. A second signal does not wait any more (Slurm sends SIGTERM when the limit is reached, and SIGKILL soon after).
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._caught: int | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._catch) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped) and callable(handler := self._before.get(error.number)):
            handler(error.number, None)

    def heed(self) -> None:
        """Call between batches, when all that is computed is on the disk.

        Raises:
            Stopped: a signal came.
        """
        if self._caught is not None:
            raise Stopped(self._caught)

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        if self._caught is not None:
            raise Stopped(self._caught)
        self._caught = number
        print(f"\n{signal.Signals(number).name}: stopping after this batch", flush=True)
