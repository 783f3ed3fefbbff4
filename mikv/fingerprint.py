"""Names for identities and contents: hashes that are the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mikv.digests import file_digest

# Files up to this size go into a fingerprint as they are, of larger ones their digest, which is remembered.
_SMALL_BYTES = 2**24


def fingerprint(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def record_key(run: Mapping[str, Any], policy_id: str, unit: Mapping[str, Any]) -> str:
    """Key of one policy's outcome of one unit of a run.

    Args:
        run: the run's identity.
        policy_id: fingerprint of the policy's.
        unit: doc_id, subtask and asked, of which the last two may be None.
    """
    which = {name: unit.get(name) for name in ("doc_id", "subtask", "asked")}
    return fingerprint({"run": fingerprint(run), "policy": policy_id, **which})


def content_fingerprint(path: Path) -> str:
    """16 hexadecimal digits that name the whole content of a file, or of a folder of weights; not where it lies.

    Every byte counts: fine-tunes of one model are equally large and may differ in a few tensors. In a folder the names of
    files count, hidden files (a downloader's notes) and texts about it (*.md) do not.

    Raises:
        OSError, ValueError: a file can't be read, or was changed while it was.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = "" if file == path else str(file.relative_to(path))  # a single file's own name is where it lies
        if file.is_file() and not (name.endswith(".md") or any(part.startswith(".") for part in Path(name).parts)):
            size = file.stat().st_size
            digest.update(f"{name}:{size};".encode())
            digest.update(file.read_bytes() if size <= _SMALL_BYTES else file_digest(file).encode())
    return digest.hexdigest()[:16]
