"""The folder of one run: identity, samples, summary."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mikv.records.claim import LEASE, Claim
from mikv.records.files import RecordError, Row, read_rows, to_line, write_atomically

_PACKAGES = ("torch", "transformers", "peft", "numpy", "mikv")


class RunFolder:
    """The folder of one run. Use as a context manager: it is claimed, so that two processes don't compute the same.

    A writer has a samples file of its own: what is there is copied to a new file of the same name, which it appends to. Whoever
    held the claim before and wakes up (see Claim) writes to a file that has no name any more: it can't tear the lines of the
    new writer. What was torn before is not copied.

    Args:
        path: the folder; made where it doesn't exist.
        identity: everything but policy and sample that changes an outcome. A folder made by a run with another identity
            is refused.
        config: the resolved configuration as YAML text.
        lease: see Claim.

    Raises:
        RecordError: on entering and in all methods; the message says what to do.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], config: str, lease: float = LEASE) -> None:
        self.path = path
        self._identity, self._config, self._lease = identity, config, lease
        self._samples = path / "samples.jsonl"
        self._claim: Claim | None = None
        self._descriptor: int | None = None

    def __enter__(self) -> RunFolder:
        with self._writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = Claim(self.path, self._lease).__enter__()
        try:
            self._check_identity()
            if self._claim.succeeded and self._samples.exists():
                self.samples()  # tells of a torn line
                # before `samples` is asked: what the one before may still write never counts
                self._descriptor = self._own_file()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._claim is not None:
            self._claim.__exit__(kind, error, traceback)
            self._claim = None

    def _check_identity(self) -> None:
        file = self.path / "run.json"
        if file.exists():
            before = read_identity(self.path)
            differing = sorted(_differences(before, json.loads(json.dumps(self._identity))))
            if differing:
                raise RecordError(
                    f"{self.path} holds the records of another run; it differs in:\n  "
                    + "\n  ".join(differing)
                    + "\nChoose another name (name=...), or remove that folder."
                )
        else:
            self._write(file, json.dumps({"identity": self._identity, "environment": environment()}, indent=2))
        self._write(self.path / "config.yaml", self._config)

    def samples(self) -> dict[str, Row]:
        """All finished samples by key. A last line that was cut off by a kill is passed over, with a message; anything else
        that is no record is refused."""
        return self._read(torn=print)

    def _read(self, torn: Callable[[str], None]) -> dict[str, Row]:
        return {row["key"]: row for row in read_rows(self._samples, torn)} if self._samples.exists() else {}

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows and bring them to the disk: what is computed is not lost."""
        self._still_mine()
        if self._descriptor is None:
            self._descriptor = self._own_file()
        whole = os.fstat(self._descriptor).st_size
        text = "".join(map(to_line, rows)).encode()
        with self._writing(self._samples):
            try:
                while text:
                    text = text[os.write(self._descriptor, text) :]
                os.fsync(self._descriptor)
            except OSError:
                with contextlib.suppress(OSError):  # a full disk: half a line must not stay
                    os.ftruncate(self._descriptor, whole)
                raise

    def _own_file(self) -> int:
        """A copy of the samples in a new file under the old name, open for appending."""
        self._write(self._samples, "".join(map(to_line, self._read(torn=lambda _: None).values())))
        with self._writing(self._samples):
            return os.open(self._samples, os.O_WRONLY | os.O_APPEND)

    def write_summary(self, rows: Sequence[Row]) -> Path:
        self._still_mine()
        file = self.path / "summary.jsonl"
        self._write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return file

    def _still_mine(self) -> None:
        assert self._claim is not None, "a RunFolder writes only inside its with statement"
        self._claim.check()

    def _write(self, file: Path, text: str) -> None:
        with self._writing(file):
            write_atomically(file, text)

    @contextlib.contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        """What the file system says, and what the user can do."""
        try:
            yield
        except OSError as error:
            raise RecordError(
                f"{place} can't be written ({error.strerror}). Records that are there are kept: make room or get the right to "
                "write, and the same command goes on; or choose another place with out="
            ) from error


def read_identity(folder: Path) -> Any:
    """The identity of the run that made a folder."""
    file = folder / "run.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file} is damaged ({error}); choose another name (name=...), or remove that file") from error


def environment() -> dict[str, Any]:
    """Where and with what a run is made: git commit, package versions, machine. Nothing secret, nothing that is hashed."""
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": packages,
        "system": platform.platform(),
        "processors": os.cpu_count(),
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() | now.keys():
            yield from _differences(before.get(name), now.get(name), f"{at}.{name}" if at else name)
    elif before != now:
        yield f"{at}: {before!r} there, {now!r} now"
