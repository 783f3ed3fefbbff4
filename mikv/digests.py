"""SHA-256 of whole files, remembered in the user's cache folder: a checkpoint of 15 GB takes 15 to 40 s to read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# From this size on it is said that a file is read.
TOLD_BYTES = 2**30
# A file that was changed so shortly before it was read could change again without a new time of change: file systems count
# in ticks of up to 2 s. Its digest is not remembered.
SETTLED_NS = 2 * 10**9


def cache_dir() -> Path:
    """Where the project keeps what can be made again: $MIKV_CACHE, else the user's cache folder."""
    if "MIKV_CACHE" in os.environ:
        return Path(os.environ["MIKV_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mikv"


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits.

    A remembered digest counts as long as the file system says the same of the file: size, inode, time of the last change of
    its content, and of its status, which nobody can set back. Anything else, and the file is read again.

    Raises:
        ValueError: the file was changed while it was read.
        OSError: it can't be read.
    """
    before = _stamp(file)
    note = cache_dir() / "sha256" / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
    remembered = _recall(note)
    if remembered.get("stamp") == before:
        return str(remembered["sha256"])
    if before["size"] >= TOLD_BYTES:
        print(f"reading {file.name} ({before['size'] / 1e9:.1f} GB) for its fingerprint, once ...", flush=True)
    begun = time.time_ns()
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if _stamp(file) != before:
        raise ValueError(f"{file} was changed while it was read: wait until it is written")
    if begun - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED_NS:
        _remember(note, {"stamp": before, "sha256": digest})
    return digest


def _stamp(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {"size": stat.st_size, "inode": stat.st_ino, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _recall(note: Path) -> dict[str, Any]:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(note: Path, known: dict[str, Any]) -> None:
    """Written beside its place and renamed: another process reads the old note or the new one. A cache that can't be written
    to costs time and nothing else."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as scratch:
            json.dump(known, scratch)
        os.replace(scratch.name, note)
    except OSError:
        return
