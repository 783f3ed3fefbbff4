"""Runs a program that a language model wrote, confined. The only place of the project that executes generated code.

The program runs in an interpreter of its own (`interpreter.py`, no site-packages), with an almost empty environment and an
empty working directory, without input, its output thrown away. Everywhere it has a wall clock, 64 open files, no core dumps,
and writes not one byte to a file; on Linux its memory is limited, too, root's capabilities are given up (but the one to read
any file), and it dies with its parent. Beyond that there are three layers, all of them Linux's:

    namespaces  it sees no other process, so it can't signal, slow down or limit one; nobody outlives it, as the end of the
                first process of its PID namespace ends all in it; no network; no shared memory, queues or semaphores are
                left. Where there is no Landlock, everything is mounted read-only, too. All but root need a user namespace
    seccomp     a list of the kernel's calls is allowed. Not in it: sockets, other processes (threads are fine), signals to
                others, their limits and priorities, shared memory, changes of files' modes, owners and times. x86_64, aarch64
    landlock    nothing is made, removed, truncated or opened for writing (but /dev/null), and the environments of other
                processes can't be read. Kernel 5.13 or newer

Namespaces alone confine a program, and so do seccomp and Landlock together, where namespaces are refused (containers, Ubuntu's
AppArmor). All that a machine offers is used at once. One that offers less is refused, unless the user insists; there (and on
macOS) RLIMIT_NPROC forbids new processes, on Linux threads too, to everyone but root.

This is against accidents and simple tricks, not against an attacker. It does not stop a program from reading files that the
user can read, from using a bug of the kernel, from searching its own memory for the token with which its interpreter reports
that it ran to the end, or from using all cores until its time is over. Without seccomp it may also lock files that it can
read, write into named pipes and Unix sockets that it can reach, leave keys in the kernel's keyrings, and as root start
processes, which end with it. For programs that may be hostile, use a virtual machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from mikv.tasks.sandbox import interpreter
from mikv.tasks.sandbox.interpreter import REASON_CHARACTERS

OUTPUT_BYTES = 8192  # of the interpreter's reports; what comes earlier is forgotten
STARTUP_SECONDS = 60.0  # for the interpreter, before the program's time begins
LAST_SECONDS = 0.5  # for a program to end by itself that reports nothing more
END_SECONDS = 5.0  # for the processes of a namespace to bury each other
# Not -I, which is -E, -P and -s: the environment has nothing to ignore but a fixed hash seed, and the verdict on a program
# that depends on the order of a set should not change from run to run.
FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
PASSED_ON = ("LD_LIBRARY_PATH",)  # without it the interpreters of some clusters don't start
LAYERS: tuple[str, ...] = ("seccomp", "landlock", "namespaces") if sys.platform == "linux" else ()
"""What is tried. Namespaces last: how they are set up depends on whether there is Landlock."""


class ConfinementError(RuntimeError):
    """This machine can't confine programs, and nobody said that they may run anyway; the message says what is missing."""


@dataclass(frozen=True)
class Limits:
    """seconds: wall clock, from the program's start; memory_mb: address space, of which Python itself needs some 40."""

    seconds: float = 10.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if not (0 < self.seconds < math.inf and self.memory_mb >= 64):
            raise ValueError(f"a program needs some time and at least 64 MB, not {self}")


@dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end; reason: "passed", or in one short line why not.

    The reasons are "failed: ...", "timed out", "out of memory" and "killed: signal ...".
    """

    passed: bool
    reason: str


@dataclass(frozen=True)
class Confinement:
    """layers: those of LAYERS that this machine offers; refused: why it doesn't offer the others."""

    layers: tuple[str, ...]
    refused: tuple[str, ...]

    @property
    def holes(self) -> str:
        """What a program may do because nothing forbids it; "" = it is confined."""
        if "namespaces" in self.layers:
            return ""
        holes = []
        if "seccomp" not in self.layers:
            holes.append("reach the network, stop and slow down other processes, and leave some behind")
        if "landlock" not in self.layers:
            holes.append("make, empty and remove files and read the environments of other processes")
        return "; ".join(holes)


def confinement() -> Confinement:
    """What this machine offers, tried once in a process.

    Raises:
        RuntimeError: the interpreter doesn't start even without any layer; ConfinementError: this is Windows.
    """
    return _tried(LAYERS, sys.executable)


@cache
def _tried(layers: tuple[str, ...], _executable: str) -> Confinement:  # another interpreter, another answer
    _run("", Limits(), ())
    offered: list[str] = []
    refused = []
    for layer in layers:
        needed = [other for other in offered if other == "landlock"] if layer == "namespaces" else []
        try:
            _run("", Limits(), [*needed, layer])
            offered.append(layer)
        except RuntimeError as error:
            refused.append(f"{layer}: {str(error).strip().splitlines()[-1]}")
    return Confinement(tuple(offered), tuple(refused))


_unconfined = False  # the user's word, as `permit` has it


def permit(unconfined: bool = False) -> None:
    """To be asked before long work begins: can this machine confine programs?

    Args:
        unconfined: if not, they run anyway, in this process until the next call. A RuntimeWarning says what they may do.

    Raises:
        ConfinementError: it can't, and they may not.
        RuntimeError: see `confinement`.
    """
    global _unconfined
    _unconfined = unconfined
    found = _permitted()
    if found.holes:
        warnings.warn(f"generated programs may {found.holes} on this machine", RuntimeWarning, 2)


def _permitted() -> Confinement:
    found = confinement()
    if found.holes and not _unconfined:
        why = "; ".join(found.refused) or f"{sys.platform} has no namespaces, seccomp and Landlock, use Linux"
        raise ConfinementError(
            f"this machine can't confine programs that a model writes: they could {found.holes} ({why}). "
            "allow_code_execution=unconfined runs them all the same, with limits of time and memory"
        )
    return found


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Run a program; it passes if it runs to its last line: an exit before, even with status 0, is a failure.

    Nothing that the program does raises. A limit or a confinement that makes no sense for honest work is a failure like
    any other: a program that writes a file or starts a process gets an OSError.

    Raises:
        ConfinementError: this machine can't confine it, and `permit` was not told to let it run anyway; or it is Windows.
        RuntimeError: the interpreter doesn't get as far as the program. Counting that as a failure would turn a broken
            installation into a score of zero.
    """
    return _run(source, limits, _permitted().layers)


def _run(source: str, limits: Limits, layers: Sequence[str]) -> Outcome:
    if sys.platform == "win32":
        raise ConfinementError("generated programs can't be confined on Windows; use Linux (WSL will do)")
    token = secrets.token_hex(16).encode()
    directory = tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
    numbers = (str(math.ceil(limits.seconds)), str(limits.memory_mb))
    try:
        # A file, not a pipe: nobody has to feed it, and its size doesn't matter.
        with tempfile.TemporaryFile() as program:
            program.write(token + b"\n" + source.encode("utf-8", "surrogatepass"))
            program.seek(0)
            process = subprocess.Popen(
                [sys.executable, *FLAGS, os.path.abspath(interpreter.__file__), *numbers, ",".join(layers)],
                stdin=program,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=directory.name,
                env=ENVIRONMENT | {name: os.environ[name] for name in PASSED_ON if name in os.environ},
                start_new_session=True,
            )
        return _watch(process, token, limits.seconds, supervised="namespaces" in layers)
    finally:
        with contextlib.suppress(RecursionError):  # thousands of directories in each other, where they can be made: they stay
            directory.cleanup()


def _watch(process: subprocess.Popen[bytes], token: bytes, seconds: float, supervised: bool) -> Outcome:
    """Wait for the interpreter's reports: the token and a colon when the program begins, the token and a reason at its end.

    The program can't write to this pipe by accident (it has other standard files), and what doesn't carry the token is
    not believed. Its end is enough: nobody waits for processes that the program may have left.
    """
    assert process.stdout is not None
    output, started, over = b"", False, None
    timed_out = True
    deadline = time.monotonic() + STARTUP_SECONDS
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while over is None and (left := deadline - time.monotonic()) > 0 and selector.select(left):
                chunk = os.read(process.stdout.fileno(), OUTPUT_BYTES)
                if not chunk:
                    timed_out = False
                    break
                output = (output + chunk)[-OUTPUT_BYTES:]
                if not started and token + b":\n" in output:
                    started, deadline = True, time.monotonic() + seconds
                over = re.search(token + rb" (.*)\n", output)
    finally:
        # Before the process is waited for: until then nobody else can have got its number.
        if supervised and started:
            _end_namespace(process.pid, by_itself=over is not None or not timed_out)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the latter if all of them are dead
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    status = process.returncode
    if not started:
        raise RuntimeError(f"the confined interpreter did not start (status {status}): {output.decode(errors='replace')}")
    if over is not None:
        reason = over[1].decode(errors="replace")[:REASON_CHARACTERS]
        return Outcome(reason == "passed", reason)
    if timed_out or status == -signal.SIGXCPU:
        return Outcome(False, "timed out")
    if status < 0:
        with contextlib.suppress(ValueError):  # real-time signals have no name
            return Outcome(False, f"killed: signal {signal.Signals(-status).name}")
        return Outcome(False, f"killed: signal {-status}")
    return Outcome(False, f"failed: it left before its end (status {status})")


def _end_namespace(supervisor: int, by_itself: bool) -> None:
    """Let the supervisor end and bury the namespace: killed before, it would leave a zombie to whoever adopts it.

    by_itself: the program is about to end; how, its supervisor will tell.
    """
    if not (by_itself and _has_ended(supervisor, LAST_SECONDS)):
        os.kill(supervisor, signal.SIGTERM)
        _has_ended(supervisor, END_SECONDS)


def _has_ended(process: int, seconds: float) -> bool:
    """Whether a child ends in that time. It is not waited for: it keeps its number."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
