"""A claim on a folder that expires: one writer at a time, also on a shared file system without a lock server.

Why not flock: on NFS it needs a lock daemon at both ends, on Lustre and others a mount option, and without them it either fails
or silently locks against nobody on other hosts. filelock's SoftFileLease needs only what every shared file system has, the
exclusive creation of a file:

- the owner writes host, process and a token, and touches the file every few seconds;
- who wants the folder takes it over at once if the owner was a process of this host that is gone, else after it has seen no
  touch for `lease` seconds by its own clock, so that two hosts' clocks need not agree;
- an owner that was asleep for so long (suspended, cut off from the file server) finds that it was superseded and must stop.

The last is not a lock: the sleeper may wake within a write. RunFolder makes that harmless (see there).
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import TracebackType

from filelock import OwnerRecord, SoftFileLease, Timeout

from mikv.records.files import RecordError

LEASE = 60.0
"""Seconds without a sign of life after which a claim is void: long for a stalled file server, short for a requeued job."""
_BEATS = 6


class Claim:
    """Claim a folder for this process. Use as a context manager.

    Args:
        folder: exists.
        lease: seconds; the same for all who claim a folder.

    Raises:
        RecordError: another process is alive there (it is watched for one heartbeat, lease / 6).
    """

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        self._folder, self._beat = folder, lease / _BEATS
        self._file = folder / ".claim"
        # not thread-local: the heartbeat thread reports the loss of a claim to the thread that writes
        self._lock = SoftFileLease(self._file, lease_duration=lease, heartbeat_interval=self._beat, thread_local=False)

    def __enter__(self) -> Claim:
        seen = self._touched()
        told = False
        while True:
            try:
                self._lock.acquire(timeout=0)
                return self
            except Timeout:
                now = self._touched()
            if seen is not None and now is not None and (now != seen or self._is_fresh(now)):
                raise RecordError(
                    f"another process is writing to {self._folder}{self._owner()}; wait for it, or choose another name "
                    "(name=...)"
                )
            if not told:
                print(f"{self._folder} is claimed{self._owner()}; waiting for a sign of life or its expiry", flush=True)
                told = True
            seen = now
            time.sleep(self._beat / 4)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._lock.release()

    def check(self) -> None:
        """Call before each write.

        Raises:
            RecordError: this process was silent for so long that another one has taken the folder over.
        """
        if self._lock.compromise is not None or not self._lock.is_lock_held_by_us:
            raise RecordError(
                f"another process{self._owner()} has taken over {self._folder}, as this one had given no sign of life; it goes "
                "on there, and this one stops"
            )

    def _touched(self) -> tuple[int, float] | None:
        """Which file it is and when it was touched last; opened first, as NFS then asks the server."""
        try:
            with self._file.open("rb") as file:
                state = os.fstat(file.fileno())
        except OSError:
            return None
        return state.st_ino, state.st_mtime

    def _is_fresh(self, touched: tuple[int, float]) -> bool:
        """On one host there is one clock: a fresh touch needs no watching."""
        owner = self._lock.owner
        here = owner is not None and _host(owner) == socket.gethostname()
        return here and time.time() - touched[1] < 2 * self._beat

    def _owner(self) -> str:
        owner = self._lock.owner
        return "" if owner is None else f" (process {owner.pid} on {_host(owner)})"


def _host(owner: OwnerRecord) -> str:
    return owner.hostname.partition("?")[0]  # filelock appends a mark where processes are numbered apart (containers)
