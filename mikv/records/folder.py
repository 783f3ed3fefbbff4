"""The folder of one run: identity, environments, samples, summary."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mikv.records.claim import LEASE, Claim
from mikv.records.environment import environment
from mikv.records.files import RecordError, Row, read_rows, to_line, to_lines, write_atomically


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
        device: where the model runs, for the environment that rows name; None = not known.

    Raises:
        RecordError: on entering and in all methods; the message says what to do. A folder that holds files and is no run's is
            refused before anything is written.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], config: str, lease: float = LEASE, device: str | None = None
    ) -> None:
        self.path, self._device = path, device
        self._identity, self._config, self._lease = identity, config, lease
        self._samples = path / "samples.jsonl"
        self._claim: Claim | None = None
        self._descriptor: int | None = None
        self._environment: str | None = None

    def __enter__(self) -> RunFolder:
        check_is_a_runs(self.path)
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
        if (self.path / "run.json").exists():
            check_identity(self.path, self._identity)
        else:
            self._write(self.path / "run.json", json.dumps({"identity": self._identity}, indent=2))
        self._write(self.path / "config.yaml", self._config)

    def samples(self) -> dict[str, Row]:
        """All finished samples by key. A last line that was cut off by a kill is passed over, with a message; anything else
        that is no record is refused."""
        return read_samples(self.path, torn=print)

    def append(self, rows: Sequence[Row]) -> list[Row]:
        """Append rows and bring them to the disk: what is computed is not lost. Returns them as they are kept: each names this
        process's environment, unless it names one already (rows that are merged: see `add_environments`)."""
        self._still_mine()
        if self._descriptor is None:
            self._descriptor = self._own_file()
        if self._environment is None and not all("environment" in row for row in rows):
            self._environment = uuid.uuid4().hex[:8]
            mine = {"began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "device": self._device, **environment()}
            self.add_environments({self._environment: mine})
        whole = os.fstat(self._descriptor).st_size
        kept = [{"environment": self._environment, **row} for row in rows]
        text = "".join(map(to_line, kept)).encode()
        with self._writing(self._samples):
            try:
                while text:
                    text = text[os.write(self._descriptor, text) :]
                os.fsync(self._descriptor)
            except OSError:
                with contextlib.suppress(OSError):  # a full disk: half a line must not stay
                    os.ftruncate(self._descriptor, whole)
                raise
        return kept

    def _own_file(self) -> int:
        """A copy of the samples in a new file under the old name, open for appending."""
        self._write(self._samples, "".join(map(to_line, read_samples(self.path).values())))
        with self._writing(self._samples):
            return os.open(self._samples, os.O_WRONLY | os.O_APPEND)

    def add_environments(self, environments: Mapping[str, Row]) -> None:
        """Note environments, by the name that rows have for them; those that are there stay."""
        self._still_mine()
        known = read_environments(self.path)
        known |= {name: one for name, one in environments.items() if name not in known}
        lines = (json.dumps({"id": name, **known[name]}, ensure_ascii=False) + "\n" for name in known)
        self._write(self.path / "environments.jsonl", "".join(lines))

    def write_summary(self, rows: Sequence[Row]) -> Path:
        self._still_mine()
        file = self.path / "summary.jsonl"
        self._write(file, to_lines(rows))
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


def read_about(folder: Path) -> Row:
    """What run.json says: `identity`, and of a kept result set what of it was kept."""
    file = folder / "run.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        _ = about["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file} is damaged ({error}); choose another name (name=...), or move that folder away") from error
    return about


def read_identity(folder: Path) -> Any:
    """The identity of the run that made a folder."""
    return read_about(folder)["identity"]


def read_samples(folder: Path, torn: Callable[[str], None] = lambda _: None) -> dict[str, Row]:
    """The records in a folder by key; torn: see read_rows.

    Raises:
        RecordError: a line is no record.
    """
    file = folder / "samples.jsonl"
    return {row["key"]: row for row in read_rows(file, torn)} if file.exists() else {}


def check_is_a_runs(folder: Path) -> None:
    """Refuse a folder with files that no run made: a run replaces config.yaml, and its plots.

    Raises:
        RecordError
    """
    if not folder.is_dir():
        return
    # a run that begins there at this moment has its claim and a run.json that is being written
    foreign = sorted(file.name for file in folder.iterdir() if not file.name.startswith((".claim", ".run.json.")))
    if foreign and not (folder / "run.json").exists():
        raise RecordError(
            f"{folder} is not the folder of a run (it has no run.json, but {', '.join(foreign[:3])}"
            f"{' ...' if len(foreign) > 3 else ''}), and nothing was written there: choose another name (name=...) or place "
            "(out=...)"
        )


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse the folder of a run with another identity.

    Raises:
        RecordError: the message says in what they differ.
    """
    differing = sorted(_differences(read_identity(folder), json.loads(json.dumps(identity))))
    if differing:
        raise RecordError(
            f"{folder} holds the records of another run; it differs in:\n  "
            + "\n  ".join(differing)
            + "\nChoose another name (name=...), or move that folder away."
        )


def read_environments(folder: Path) -> dict[str, Row]:
    """The environments of the processes that appended rows, by the name that rows have for them.

    Raises:
        RecordError: the file is damaged.
    """
    file = folder / "environments.jsonl"
    if not file.exists():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {row.pop("id"): row for row in rows}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RecordError(
            f"{file} is damaged ({error}); move that file away: rows keep the names of their environments"
        ) from error


def _differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() | now.keys():
            yield from _differences(before.get(name), now.get(name), f"{at}.{name}" if at else name)
    elif before != now:
        yield f"{at}: {before!r} there, {now!r} now"
