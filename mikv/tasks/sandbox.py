"""Runs a program that a language model wrote, confined. The only place of the project that executes generated code.

The program runs in an interpreter of its own: without site-packages, with an almost empty environment and an empty working
directory, without input, its output thrown away. This file is also that interpreter's script: it gives up rights first
and then executes the program. What holds:

    everywhere      wall clock (the whole process group is killed); no core dumps, 64 open files, and not one byte written
                    to a file; the parent's environment is not passed on
    Linux           memory (address space, of one process); the program dies with its parent; for root: capabilities other
                    than reading and writing any file are given up
    ... + seccomp   no sockets, so no network; no other processes (threads are fine), so there is nobody to outlive the
                    program, not even in a session of its own; no signals to others. x86_64 and aarch64
    ... + Landlock  nothing is created, removed, truncated or opened for writing (but /dev/null), and the environments of
                    other processes can't be read. Kernel 5.13 or newer; before 6.2, os.truncate gets through

A seccomp filter instead of network and PID namespaces, because it needs no privilege and works where namespaces are
refused (containers, Ubuntu's AppArmor), and because RLIMIT_NPROC means nothing to root. Where it is missing, RLIMIT_NPROC
forbids new processes (on Linux threads, too) to everyone but root. What a machine can't confine is named in a RuntimeWarning.

This is against accidents, not against an attacker. It does not stop a program from reading files that the user can read,
from changing their modes, owners and times, from using a bug of the kernel, or from searching its own memory for the token
with which its interpreter reports that it ran to the end. For programs that may be hostile, use a virtual machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import dataclass
from typing import NoReturn

REASON_CHARACTERS = 200
OUTPUT_BYTES = 8192  # of the interpreter's reports; what comes earlier is forgotten
STARTUP_SECONDS = 60.0  # for the interpreter, before the program's time begins
# Not -I, which is -E, -P and -s: the environment has nothing to ignore but a fixed hash seed, and the verdict on a program
# that depends on the order of a set should not change from run to run.
FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
PASSED_ON = ("LD_LIBRARY_PATH",)  # without it the interpreters of some clusters don't start


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


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Run a program; it passes if it runs to its last line: an exit before, even with status 0, is a failure.

    Nothing that the program does raises. A limit or a confinement that makes no sense for honest work is a failure like
    any other: a program that writes a file or starts a process gets an OSError.

    Raises:
        RuntimeError: on Windows, and where the interpreter doesn't get as far as the program. Counting that as a failure
            would turn a broken installation into a score of zero.
    """
    if sys.platform == "win32":
        raise RuntimeError("generated programs can't be confined on Windows; use Linux (WSL will do) or macOS")
    token = secrets.token_hex(16).encode()
    directory = tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
    try:
        # A file, not a pipe: nobody has to feed it, and its size doesn't matter.
        with tempfile.TemporaryFile() as program:
            program.write(token + b"\n" + source.encode("utf-8", "surrogatepass"))
            program.seek(0)
            process = subprocess.Popen(
                [sys.executable, *FLAGS, os.path.abspath(__file__), str(math.ceil(limits.seconds)), str(limits.memory_mb)],
                stdin=program,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=directory.name,
                env=ENVIRONMENT | {name: os.environ[name] for name in PASSED_ON if name in os.environ},
                start_new_session=True,
            )
        return _watch(process, token, limits.seconds)
    finally:
        with contextlib.suppress(RecursionError):  # thousands of directories in each other, where they can be made: they stay
            directory.cleanup()


def _watch(process: subprocess.Popen[bytes], token: bytes, seconds: float) -> Outcome:
    """Wait for the interpreter's reports: the bare token when the program begins, the token and a reason at its end.

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
                if not started and (begun := re.search(token + rb":(.*)\n", output)):
                    started, deadline = True, time.monotonic() + seconds
                    if begun[1]:
                        warnings.warn(f"a generated program may {begun[1].decode()} on this machine", RuntimeWarning, 3)
                over = re.search(token + rb" (.*)\n", output)
    finally:
        # Before the process is waited for: until then nobody else can have got its number.
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


# --- in the confined interpreter ---


def _main(seconds: int, memory_mb: int) -> NoReturn:
    """Give up rights, say so, execute the program that stands on standard input, and say how it ended."""
    token, _, text = sys.stdin.buffer.read().partition(b"\n")
    source = text.decode("utf-8", "surrogatepass")
    report = os.dup(1)
    write, leave = os.write, os._exit  # the program may replace them
    nothing = os.open(os.devnull, os.O_RDWR)
    possible = _confine(seconds, memory_mb)
    for standard in (0, 1, 2):  # only now: until here errors are ours and somebody should read them
        os.dup2(nothing, standard)
    main = types.ModuleType("__main__")  # dataclasses and others look names up there
    sys.modules["__main__"], sys.argv = main, [""]
    write(report, token + b":" + ", ".join(possible).encode() + b"\n")
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), main.__dict__)  # not this file's __future__
        reason = "passed"
    except BaseException as error:
        reason = _reason(error)
    write(report, token + b" " + reason.encode(errors="backslashreplace") + b"\n")
    leave(0)


def _reason(error: BaseException) -> str:
    """One line about an exception, whose text is the program's: long, broken, or an exception itself."""
    if isinstance(error, MemoryError):
        return "out of memory"
    reason = f"failed: {type(error).__name__}"
    with contextlib.suppress(BaseException):
        if text := str(error)[: 2 * REASON_CHARACTERS].strip():
            reason += f": {text}"
    return " ".join(reason[: 2 * REASON_CHARACTERS].split())[:REASON_CHARACTERS]


def _confine(seconds: int, memory_mb: int) -> list[str]:
    """Set the limits and give up rights, for good. Returns what the program may do because this machine can't forbid it."""
    import resource

    possible = []
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 64)
    # Beyond the wall clock, for several threads and for orphans. Two limits, because SIGXCPU, the first one's signal, says
    # what happened, and SIGKILL doesn't.
    _limit(resource.RLIMIT_CPU, seconds + 1, seconds + 2)
    filtered = sealed = False
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, memory_mb << 20)
        filtered, sealed = _confine_linux()
    else:
        possible.append("use all memory")  # macOS refuses or ignores the limit
    if not filtered:
        possible.append("reach the network and other processes")
        _limit(resource.RLIMIT_NPROC, 1)
    if not sealed:
        possible.append("remove files and read the environments of other processes")
    return possible


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit; one that is lower already stays."""
    import resource

    highest = resource.getrlimit(kind)[1]
    if highest == resource.RLIM_INFINITY:  # -1
        highest = sys.maxsize
    resource.setrlimit(kind, (min(soft, highest), min(soft if hard is None else hard, highest)))


# What a filter needs to know of a machine: its number, the calls whose first argument decides, and those never allowed.
# clone3 is not among them: it hides its flags behind a pointer, and libc uses clone if it seems not to exist.
# From the kernel's asm/unistd_64.h and asm-generic/unistd.h.
CLONE3 = 435
MACHINES = {
    "x86_64": (
        {"arch": 0xC000003E, "clone": 56, "kill": 62, "tgkill": 234},
        # socket, fork, vfork, ptrace, rt_sigqueueinfo, tkill, rt_tgsigqueueinfo, process_vm_writev, pidfd_send_signal,
        # io_uring_setup (a way around the filter)
        (41, 57, 58, 101, 129, 200, 297, 311, 424, 425),
    ),
    "aarch64": (
        {"arch": 0xC00000B7, "clone": 220, "kill": 129, "tgkill": 131},
        # socket, ptrace, rt_sigqueueinfo, tkill, rt_tgsigqueueinfo, process_vm_writev, pidfd_send_signal, io_uring_setup
        (198, 117, 138, 130, 240, 271, 424, 425),
    ),
}


def _confine_linux() -> tuple[bool, bool]:
    """Whether a seccomp filter and a Landlock domain could be set. Both bind the process, its threads and what it executes."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, *arguments: int) -> bool:
        words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
        return int(libc.prctl(option, *words)) == 0

    # Of root's capabilities only CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH remain (bits 1 and 2): the interpreter's files may
    # belong to somebody else. In particular not the one to raise limits again. For others there is nothing to give up.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # twice 32 bits of effective, permitted, inheritable
    if libc.capget(header, sets) == 0:
        sets[:] = [sets[0] & 0b110, sets[1] & 0b110, 0, 0, 0, 0]
        libc.capset(header, sets)
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS: what the next two ask of a process without privileges

    sealed = False
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)  # landlock_create_ruleset: which version?
    if abi >= 1:
        write_file, remove_and_make, truncate = 1 << 1, 0b1_1111_1111 << 4, (1 << 14 if abi >= 3 else 0)
        handled = struct.pack("Q", write_file | remove_and_make | truncate)
        rules = libc.syscall(444, handled, ctypes.c_size_t(len(handled)), 0)
        null = os.open(os.devnull, os.O_PATH)
        libc.syscall(445, rules, 1, struct.pack("=Qi", write_file, null), 0)  # landlock_add_rule
        sealed = libc.syscall(446, rules, 0) == 0  # landlock_restrict_self
        os.close(null)
        os.close(rules)

    if (machine := os.uname().machine) not in MACHINES:
        return False, sealed
    code = b"".join(struct.pack("HBBI", *step) for step in _filter(machine))
    steps = ctypes.create_string_buffer(code, len(code))
    whole = struct.pack("HP", len(code) // 8, ctypes.addressof(steps))
    pointer = ctypes.create_string_buffer(whole, len(whole))
    return prctl(22, 2, ctypes.addressof(pointer)), sealed  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The seccomp filter as BPF: (operation, steps to skip if true, steps to skip if false, operand)."""
    calls, denied = MACHINES[machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    call, arch, first_argument = 0, 4, 16  # where they stand in struct seccomp_data
    clone_thread = 0x10000
    allow, deny, missing = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x50000 | 1), (answer, 0, 0, 0x50000 | 38)  # errno

    def for_call(number: int, *steps: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [(equal, 0, len(steps), number), *steps]

    to_itself = ((load, 0, 0, first_argument), (equal, 0, 1, os.getpid()), allow, deny)
    return [
        *((load, 0, 0, arch), (equal, 1, 0, calls["arch"]), deny),  # calls of another machine, with other numbers
        *((load, 0, 0, call), (at_least, 0, 1, 0x40000000), deny),  # the same, of x32
        *for_call(calls["clone"], (load, 0, 0, first_argument), (any_bit, 0, 1, clone_thread), allow, deny),
        *for_call(calls["kill"], *to_itself),
        *for_call(calls["tgkill"], *to_itself),
        *for_call(CLONE3, missing),
        *(step for number in denied for step in for_call(number, deny)),
        allow,
    ]


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
