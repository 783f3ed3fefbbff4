"""Where and with what a process makes records: code, packages, machine. Each process that appends rows notes its own, and its
rows name it, so that a resume over two commits or on another GPU can be seen. Nothing secret, no host name, nothing hashed into
a key."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "lm-eval", "tokenizers", "triton", "peft", "numpy", "mikv")


@cache
def environment() -> dict[str, Any]:
    """Of this process, as JSON values; None = not known, or not there.

    git_commit, git_dirty: of the project's code (not of results/, where runs and figures are written); python; packages:
    versions; cuda: torch's CUDA (or ROCm) version; gpus: names; driver: of NVIDIA; processor, processors: kind and number;
    cpu_capability: instruction set that torch uses; threads: of it.
    """
    return {
        **code_state(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": _versions(),
        "system": platform.platform(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        **(_of_torch() if "torch" in sys.modules else {}),  # whoever computed something has loaded it
    }


def code_state(folder: Path) -> dict[str, Any]:
    """git_commit and git_dirty of the checkout that a folder lies in."""
    git = ("git", "-C", str(folder))
    status = _said(*git, "status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
    return {"git_commit": _said(*git, "rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


def _of_torch() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": gpus,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if gpus else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def summarized(environments: list[dict[str, Any]]) -> str:
    """For a line of a list: commits (+ = with changes that are in no commit), versions of torch and transformers, devices."""
    parts = []
    for name in ("commit", "torch", "transformers", "device"):
        found = dict.fromkeys(_short(one, name) for one in environments)
        parts.append(" and ".join(filter(None, found)))
    commits, torch, transformers, devices = parts
    return f"commit {commits or 'not known'}, torch {torch}, transformers {transformers}, {devices}"


def _short(environment: dict[str, Any], name: str) -> str:
    if name == "commit":
        commit = environment.get("git_commit")
        return f"{commit[:8]}{'+' if environment.get('git_dirty') else ''}" if commit else ""
    if name == "device":
        used = environment.get("device") or ", ".join(dict.fromkeys(environment.get("gpus") or ())) or "cpu"
        return f"CPU {environment.get('cpu_capability', '')}".strip() if used == "cpu" else str(used)
    return str(environment.get("packages", {}).get(name, ""))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _said(*command: str) -> str | None:
    """What a program prints; None where it isn't there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
