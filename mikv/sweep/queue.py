"""What Slurm says of jobs. A cluster need not keep accounts (sacct): then the controller's memory of a few minutes must do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
ENDED = frozenset(
    {
        *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"),
        *("OUT_OF_MEMORY", "REVOKED"),
    }
)
"""Every other name (RUNNING, COMPLETING, SIGNALING, STAGE_OUT ...) is a job at work."""


def states(ids: Collection[str]) -> dict[str, str]:
    """State by job id (13_0), for those that Slurm knows.

    Raises:
        OSError: Slurm does not answer.
    """
    if not ids:
        return {}
    if shutil.which("squeue") is None:
        raise OSError("this sweep went to Slurm, but there is no squeue here: ask on a machine of the cluster")
    asked = ["squeue", "--noheader", "--array", "--states=all", "--me", "--format=%i|%T"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise OSError(f"squeue does not answer: {done.stderr.strip()}")
    found = _parse(done.stdout, ids)
    if forgotten := set(ids) - found.keys():
        jobs = ",".join(sorted({job.partition("_")[0] for job in forgotten}))
        command = ["sacct", "--parsable2", "--noheader", "-X", "-o", "JobID,State", "-j", jobs]
        if shutil.which("sacct") is not None:  # which says so with an error where no accounts are kept
            kept = _parse(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout, ids)
            found = kept | found
    return found


def _parse(text: str, ids: Collection[str]) -> dict[str, str]:
    """Lines of ID|STATE; a state may have more behind it (CANCELLED by 1000)."""
    fields = (line.split("|") for line in text.splitlines() if "|" in line)
    return {field[0]: field[1].split()[0] for field in fields if field[0] in ids and field[1]}
