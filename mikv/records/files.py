"""Reading and writing the files of records, so that a kill or a full disk never leaves a part of something unnoticed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Raised when the meaning of a stored field changes; lines of another version are refused, not misread.
VERSION = 2


class RecordError(RuntimeError):
    """Records can't be read or written; the message says which line, and what to do."""


def read_rows(file: Path, torn: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Rows of a JSON-lines file. The file is not changed.

    torn: is told of a last line that was cut off (a writer was killed in it, or is at it), which is passed over then; without
    it such a line is refused.

    Raises:
        RecordError: a line is no record, or of another version.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RecordError(f"{file} can't be read ({error.strerror})") from error
    end = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        last = end + len(line) == len(data)
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if not isinstance(row, dict) or "key" not in row or not line.endswith(b"\n"):
            if last and torn is not None:
                torn(f"{file}: the last line was cut off by an interruption; it is computed again")
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


def to_line(row: Row) -> str:
    """A record as its line."""
    return json.dumps({"version": VERSION} | row, ensure_ascii=False) + "\n"


def to_lines(rows: Sequence[Row]) -> str:
    """The text of a summary."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_atomically(file: Path, text: str) -> None:
    """Write a whole file so that a reader, or who comes after a crash, sees the old content or the new, never a part.

    The scratch file carries host and process: on a shared file system two hosts may have the same process number.
    """
    scratch = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # else a crash of the machine may bring the new name with no content
        scratch.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
