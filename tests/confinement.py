"""What the tests of the sandbox need: which layers of confinement this machine has, and ways to use only some of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LINUX = sys.platform == "linux"
# Asked here once more, not of the sandbox: if it wrongly gives up, the tests must fail and not be skipped.
SECCOMP = LINUX and platform.machine() in ("x86_64", "aarch64") and "Seccomp:" in Path("/proc/self/status").read_text()
LANDLOCK = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) if LINUX else 0  # its version
_NEW = f"""
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.unshare(0x6C020000 | (0x10000000 if os.geteuid() else 0)) == 0
assert libc.mount(None, b"/", None, ctypes.c_ulong(16384 | 1 << 18), None) == 0 or {LANDLOCK} > 0
"""
NAMESPACES = LINUX and subprocess.run([sys.executable, "-c", _NEW], capture_output=True).returncode == 0

needs_linux = pytest.mark.skipif(not LINUX, reason="only Linux can do this")
needs_seccomp = pytest.mark.skipif(not SECCOMP, reason="needs seccomp, on x86_64 or aarch64")
needs_landlock = pytest.mark.skipif(LANDLOCK < 1, reason="needs Landlock (Linux 5.13 or newer, unless switched off)")
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="this machine refuses namespaces")

WAYS = [
    pytest.param(("seccomp", "landlock", "namespaces"), id="all", marks=[needs_seccomp, needs_landlock, needs_namespaces]),
    pytest.param(("seccomp", "landlock"), id="without-namespaces", marks=[needs_seccomp, needs_landlock]),
    pytest.param(("namespaces",), id="namespaces-alone", marks=needs_namespaces),
]
"""Sets of layers that confine a program, each of them alone."""


def processes(marker: str) -> list[int]:
    """Numbers of the processes, but this one, whose command line contains the marker."""
    if LINUX:
        commands = {}
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended
                commands[int(file.parent.name)] = file.read_text(errors="replace")
    else:
        listed = subprocess.run(["ps", "-axww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
        commands = {int(number): command for number, command in (line.split(None, 1) for line in listed.splitlines())}
    return [number for number, command in commands.items() if marker in command and number != os.getpid()]


def descendants(number: int) -> Iterator[int]:
    with contextlib.suppress(OSError):  # it has ended
        for child in Path(f"/proc/{number}/task/{number}/children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def alive(number: int) -> bool:
    status = Path(f"/proc/{number}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
