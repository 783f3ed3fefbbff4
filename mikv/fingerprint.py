"""Names for identities and contents: hashes that are the same on every machine. Imports nothing of the project."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    """16 hexadecimal digits that name the content of a file, or of a folder of weights.

    Small files are read whole, large ones in 64 places: checkpoints of one architecture are equally large, and differ
    everywhere. In a folder hidden files (a downloader's notes) and texts about it (*.md) do not count.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = "" if file == path else str(file.relative_to(path))  # a single file's own name is where it lies
        if file.is_file() and not (name.endswith(".md") or any(part.startswith(".") for part in Path(name).parts)):
            digest.update(f"{name}:{file.stat().st_size};".encode())
            if file.stat().st_size <= 2**24:
                digest.update(file.read_bytes())
            else:
                with file.open("rb") as data:
                    for block in range(64):
                        data.seek(file.stat().st_size * block // 64)
                        digest.update(data.read(4096))
    return digest.hexdigest()[:16]
