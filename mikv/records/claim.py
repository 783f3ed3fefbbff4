"""A claim on a folder that expires: one writer at a time, also on a shared file system without a lock server.

    .claim.7     who holds the folder: host, process, and whether it was given back. The highest number counts

Why not flock: on NFS it needs a lock daemon at both ends, on Lustre a mount option; without them it fails, or silently locks
against nobody on other hosts. Why not filelock's SoftFileLease: it takes an expired claim over by exchanging two names, which
NFS refuses, and a process killed between making its file and writing it blocks the folder for good. This needs only that a hard
link to a taken name fails, which every shared file system of a cluster has:

- who claims makes number n + 1, complete, by a link: of many that try, one succeeds. Numbers never go back, as the highest
  file is never removed, so nobody can succeed a claim that is not there any more;
- the holder touches its file every lease / 6 seconds. A claim is void if it was given back, if its holder was a process of
  this host that is gone, or if the waiter has seen no touch for `lease` seconds by its own clock: two hosts' need not agree;
- a holder that was asleep for so long (suspended, cut off from the file server) finds its file gone and must stop.

The last is not a lock: the sleeper may wake within a write. RunFolder makes that harmless (see there).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from mikv.records.files import RecordError

LEASE = 60.0
"""Seconds without a sign of life after which a claim is void: long for a stalled file server, short for a requeued job."""
_BEATS = 6
_GIVEN_BACK = "\ngiven back\n"


@dataclass(frozen=True)
class _Holder:
    """namespace: in which the process has its number (containers have their own); started: Unix seconds."""

    host: str
    namespace: int
    process: int
    started: float

    @classmethod
    def parse(cls, text: str) -> _Holder:
        """Of a file that is damaged (a machine crashed): a stranger, whose claim must expire."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls("an unknown host", 0, 0, 0.0)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def here(self) -> bool:
        return (self.host, self.namespace) == (socket.gethostname(), _namespace())

    @property
    def gone(self) -> bool:
        """Whether it was a process of this host that has ended; its number may have been given to another one."""
        if not self.here:
            return False
        try:
            process = psutil.Process(self.process)
            # a few seconds' grace: the start is reckoned from the boot time, which moves as the clock is set
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 5
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class _Claimed:
    """The claim that counts, as it is on the disk. number 0 = nobody ever claimed. holder None = it was given back."""

    number: int
    holder: _Holder | None = None
    touched: float = 0.0


class Claim:
    """Claim a folder for this process. Use as a context manager.

    Args:
        folder: exists.
        lease: seconds; the same for all who claim a folder.

    Raises:
        RecordError: another process is alive there (it is watched for one heartbeat, lease / 6, before that is said).
        OSError: the folder can't be written.
    """

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        self._folder, self._lease, self._beat = folder, lease, lease / _BEATS
        self._number = 0
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None
        self.succeeded = False
        """Whether the holder before did not give it back: it was killed, or sleeps."""

    def __enter__(self) -> Claim:
        seen = self._read()
        since, told = time.monotonic(), False
        while True:
            now = self._read()
            if now != seen and seen.holder is None:
                since = time.monotonic()
            if seen.holder is not None and now.holder is not None and (now != seen or self._fresh(now)):
                raise RecordError(
                    f"another process is writing to {self._folder} ({now.holder}); wait for it, or choose another name "
                    "(name=...)"
                )
            seen = now
            if now.holder is None or now.holder.gone or time.monotonic() - since >= self._lease:
                if self._take(now.number + 1):
                    self.succeeded = now.holder is not None
                    self._heart = threading.Thread(target=self._live, daemon=True)
                    self._heart.start()
                    return self
                continue
            if not told:
                print(f"{self._folder} is claimed ({now.holder}); waiting for a sign of life or its expiry", flush=True)
                told = True
            time.sleep(self._beat / 4)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
        with contextlib.suppress(OSError):  # it is gone, or can't be written: then it expires
            descriptor = os.open(self._file(self._number), os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, _GIVEN_BACK.encode())
            finally:
                os.close(descriptor)

    def check(self) -> None:
        """Call before each write.

        Raises:
            RecordError: this process was silent for so long that another one has taken the folder over.
        """
        now = self._read()
        if now.number != self._number:
            successor = "another process" if now.holder is None else f"another process ({now.holder})"
            raise RecordError(
                f"{successor} has taken over {self._folder}, as this one had given no sign of life; it goes on there, and this "
                "one stops"
            )

    def _file(self, number: int) -> Path:
        return self._folder / f".claim.{number}"

    def _numbers(self) -> list[int]:
        names = (name.removeprefix(".claim.") for name in os.listdir(self._folder) if name.startswith(".claim."))
        return sorted(int(name) for name in names if name.isdigit())

    def _read(self) -> _Claimed:
        """The claim that counts. Opened to be looked at, as NFS then asks the server."""
        while numbers := self._numbers():
            with contextlib.suppress(FileNotFoundError), self._file(numbers[-1]).open(encoding="utf-8") as file:
                text = file.read()
                holder = None if text.endswith(_GIVEN_BACK) else _Holder.parse(text)
                return _Claimed(numbers[-1], holder, os.fstat(file.fileno()).st_mtime)
        return _Claimed(0)

    def _fresh(self, claimed: _Claimed) -> bool:
        """On one host there is one clock: a fresh touch needs no watching."""
        holder = claimed.holder
        return holder is not None and holder.here and not holder.gone and time.time() - claimed.touched < 2 * self._beat

    def _take(self, number: int) -> bool:
        """Whether this process was the one that made a claim. Those before it are removed."""
        me = _Holder(socket.gethostname(), _namespace(), os.getpid(), psutil.Process().create_time())
        scratch = self._folder / f".claiming.{uuid.uuid4().hex}"
        try:
            scratch.write_text(json.dumps(asdict(me)), encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(scratch, self._file(number))
            # not the link's own answer: NFS may carry it out, lose the answer, and refuse it when it is repeated
            mine = scratch.stat().st_nlink == 2
        finally:
            scratch.unlink(missing_ok=True)
        if mine and (others := self._numbers())[-1] != number:  # who thought so slowly that the number had come and gone
            assert others[-1] > number
            self._file(number).unlink(missing_ok=True)
            return False
        if mine:
            for before in others[:-1]:
                self._file(before).unlink(missing_ok=True)
            self._number = number
        return mine

    def _live(self) -> None:
        while not self._ended.wait(self._beat):
            with contextlib.suppress(OSError):  # gone: `check` tells. Else the next beat may come through
                os.utime(self._file(self._number))


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux: there are no containers to be told apart
        return 0
