"""The records of a run: append-only, one line per (policy, sample), keyed by a hash of everything that changes the outcome.

    results/runs/<name>/config.yaml      the resolved configuration
                        run.json         identity (what is hashed), git commit, package versions, device
                        samples.jsonl    one line per policy and sample, flushed as it is produced
                        summary.jsonl    one line per policy, replaced as a whole when the run ends
                        curve.png        the plot

A finished key is never computed again; a killed run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Raised when the meaning of a stored field changes; lines of another version are refused, not misread.
VERSION = 1
_PACKAGES = ("torch", "transformers", "peft", "numpy", "mikv")


class RecordError(RuntimeError):
    """Records can't be read or written; the message says which line, and what to do."""


class RunFolder:
    """The folder of one run. Use as a context manager: it is locked, so that two processes don't write the same file.

    Args:
        path: the folder; made where it doesn't exist.
        identity: everything but policy and sample that changes an outcome. A folder made by a run with another identity
            is refused.
        config: the resolved configuration as YAML text.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], config: str) -> None:
        self.path = path
        self._identity, self._config = identity, config
        self._samples = path / "samples.jsonl"
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise RecordError(f"{self.path} can't be written ({error.strerror}); choose another place with out=") from error
        try:
            _lock(self._lock, self.path)
            self._check_identity()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # gives the lock back
            self._lock = None

    def _check_identity(self) -> None:
        file = self.path / "run.json"
        if file.exists():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(
                    f"{file} is damaged ({error}); choose another name (name=...), or remove that file"
                ) from error
            differing = sorted(_differences(before, json.loads(json.dumps(self._identity))))
            if differing:
                raise RecordError(
                    f"{self.path} holds the records of another run; it differs in:\n  "
                    + "\n  ".join(differing)
                    + "\nChoose another name (name=...), or remove that folder."
                )
        else:
            write_atomically(file, json.dumps({"identity": self._identity, "environment": environment()}, indent=2))
        write_atomically(self.path / "config.yaml", self._config)

    def samples(self) -> dict[str, Row]:
        """All finished samples by key. A last line that was cut off by a kill is removed; anything else that is no record
        is refused."""
        if not self._samples.exists():
            return {}
        rows = {}
        for row in read_rows(self._samples, repair=True):
            rows[row["key"]] = row
        return rows

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows and bring them to the disk: what is computed is not lost."""
        text = "".join(json.dumps({"version": VERSION} | row, ensure_ascii=False) + "\n" for row in rows)
        with open(self._samples, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def write_summary(self, rows: Sequence[Row]) -> Path:
        file = self.path / "summary.jsonl"
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return file


def read_rows(file: Path, repair: bool = False) -> Iterator[Row]:
    """Rows of a JSON-lines file. repair: a torn last line (a writer was killed in it) is cut off, with a message.

    Raises:
        RecordError: a line is no record, or of another version.
    """
    data = file.read_bytes()
    end = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        last = end + len(line) == len(data)
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if not isinstance(row, dict) or "key" not in row or not line.endswith(b"\n"):
            if last and repair:
                print(f"{file}: the last line was cut off by an interruption; it is computed again")
                os.truncate(file, end)
                return
            raise RecordError(
                f"{file}:{number} is no record: {line[:60]!r}...\nThe file was changed by something else. Remove the line "
                "(its sample is then computed again) or move the folder away."
            )
        if row.get("version", VERSION) != VERSION:
            raise RecordError(
                f"{file}:{number} has records of version {row['version']}, this program reads version {VERSION}: choose "
                "another name (name=...), or read it with the version of the program that wrote it"
            )
        yield row
        end += len(line)


def write_atomically(file: Path, text: str) -> None:
    """Write a whole file so that a reader sees the old content or the new, never a part."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)


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


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows; there, don't run the same name twice at once
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RecordError(f"another process is writing to {path}; wait for it, or choose another name (name=...)") from error


def _differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() | now.keys():
            yield from _differences(before.get(name), now.get(name), f"{at}.{name}" if at else name)
    elif before != now:
        yield f"{at}: {before!r} there, {now!r} now"
