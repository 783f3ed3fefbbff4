"""Rights that a process of Linux can give up: namespaces, capabilities, Landlock. Run by path: it imports nothing of mikv.

Everything here raises OSError where the machine refuses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import struct
from typing import NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)

# linux/sched.h
_NAMESPACES = {"user": 0x10000000, "pid": 0x20000000, "ipc": 0x08000000, "net": 0x40000000, "uts": 0x04000000}
_MOUNTS = 0x00020000
# linux/mount.h
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_EXEC, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_MOUNT_OPTIONS = {"nosuid": _NO_SETUID, "nodev": _NO_DEVICES, "noexec": _NO_EXEC}
_MOUNT_OPTIONS |= {"noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}
_DEVICES = ("null", "zero", "random", "urandom")
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38  # PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS


def enter_namespaces(read_only: bool) -> None:
    """Go on in a process that sees no other ones, has no network, and shares no memory, queues or semaphores with anybody.

    It is a child of the first process of its PID namespace, whose end is the end of all in it. That one is a child of this
    process, which ends as the program ends; at SIGTERM it ends them. So whoever waits for this process leaves no zombie.

    Args:
        read_only: files can't be changed, and but for a few harmless ones no device can be opened (what Landlock else does).
    """
    # Root needs no user namespace for the others, and in one of its own could no longer read others' files.
    kinds = [flag for kind, flag in _NAMESPACES.items() if kind != "user" or os.geteuid() != 0]
    user, group = os.geteuid(), os.getegid()
    _succeed(_LIBC.unshare(sum(kinds) | (_MOUNTS if read_only else 0)), "namespaces")
    if user != 0:
        _write("/proc/self/setgroups", "deny")  # else the next but one is refused
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    die_with_parent()
    if (first := os.fork()) != 0:
        _supervise(first)
    die_with_parent()
    if read_only:
        _mount_read_only()
    if (program := os.fork()) != 0:
        _be_first(program)


def _write(file: str, text: str) -> None:
    with open(file, "w") as opened:
        opened.write(text)


def _succeed(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what} refused: {os.strerror(ctypes.get_errno())}")


def _supervise(first: int) -> NoReturn:
    """Wait for the first process of the namespace, and end as it says that the program ended."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
    silence()
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # before its number can become another's
    status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    number = -status if status < 0 else status - 128
    if number > 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(status)


def _be_first(program: int) -> NoReturn:
    """Bury the dead of the namespace until the program is among them; say how it ended as shells do.

    No signal from within the namespace reaches its first process, except those that have a handler.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    silence()
    dead = 0
    while dead != program:
        dead, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    os._exit(128 - code if code < 0 else min(code, 127))


def silence() -> None:
    """Let the standard files lead nowhere."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)


def _mount_read_only() -> None:
    """No file can be changed in this mount namespace, by any path; other processes' are as before."""
    _mount(None, "/", _RECURSIVE | _PRIVATE)  # first of all: else the next ones reach the parent's
    for name in _DEVICES:
        _mount(f"/dev/{name}", f"/dev/{name}", _BIND)
    with contextlib.suppress(OSError):  # in some containers; there /proc stays the parent's, which is read-only
        _mount("proc", "/proc", _READ_ONLY | _NO_SETUID | _NO_DEVICES | _NO_EXEC, kind="proc")
    flags = _READ_ONLY | _NO_SETUID | _NO_DEVICES
    try:
        _set_mount_flags("/", flags, 0, recursive=True)
    except OSError:  # before Linux 5.12: one by one
        for place, options in _mounts():
            _mount(None, place, _REMOUNT | _BIND | flags | options)
        for name in _DEVICES:
            _mount(None, f"/dev/{name}", _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID)
        return
    for name in _DEVICES:
        _set_mount_flags(f"/dev/{name}", 0, _NO_DEVICES)


def _mount(source: str | None, target: str, flags: int, kind: str | None = None) -> None:
    texts = [None if text is None else text.encode(errors="surrogateescape") for text in (source, target, kind)]
    _succeed(_LIBC.mount(*texts, ctypes.c_ulong(flags), None), f"mounting {target}")


def _set_mount_flags(target: str, flags: int, cleared: int, recursive: bool = False) -> None:
    """mount_setattr, whose numbers of these flags are those of mount."""
    attributes = struct.pack("4Q", flags, cleared, 0, 0)
    how = 0x8000 if recursive else 0  # AT_RECURSIVE
    number, here, size = ctypes.c_long(442), -100, ctypes.c_size_t(len(attributes))
    _succeed(_LIBC.syscall(number, here, target.encode(), how, attributes, size), f"changing the mount {target}")


def _mounts() -> list[tuple[str, int]]:
    """Place and options of each mount that isn't hidden by another one."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        fields = [line.split(" ") for line in file]
    options = {of[4]: sum(_MOUNT_OPTIONS.get(option, 0) for option in of[5].split(",")) for of in fields}
    return [(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place), flags) for place, flags in options.items()]


def drop_capabilities() -> None:
    """Of root's capabilities only CAP_DAC_READ_SEARCH (bit 2) remains: the interpreter's files may belong to somebody else.

    In particular not the one to raise limits again. For others there is nothing to give up, or what a namespace gave them.
    """
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # twice 32 bits of effective, permitted, inheritable
    _succeed(_LIBC.capget(header, sets), "reading capabilities")
    sets[:] = [sets[0] & 0b100, sets[1] & 0b100, 0, 0, 0, 0]
    _succeed(_LIBC.capset(header, sets), "giving up capabilities")


def die_with_parent() -> None:
    """Call after changes of rights: some of them undo it."""
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)


def no_new_privileges() -> None:
    """What Landlock and seccomp ask of a process without privileges."""
    _prctl(_NO_NEW_PRIVILEGES, 1)


def _prctl(option: int, argument: int) -> None:
    words = [ctypes.c_ulong(word) for word in (argument, 0, 0, 0)]
    _succeed(_LIBC.prctl(option, *words), "prctl")


def seal_files() -> None:
    """With Landlock: nothing is made, removed or opened for writing but /dev/null; others' /proc files can't be read."""
    version = _LIBC.syscall(444, None, ctypes.c_size_t(0), 1)  # landlock_create_ruleset
    if version < 1:
        raise OSError(ctypes.get_errno(), "Landlock needs Linux 5.13 or newer, and may be switched off")
    write_file, remove_and_make, truncate = 1 << 1, 0b1_1111_1111 << 4, (1 << 14 if version >= 3 else 0)
    handled = struct.pack("Q", write_file | remove_and_make | truncate)
    rules = _LIBC.syscall(444, handled, ctypes.c_size_t(len(handled)), 0)
    null = os.open(os.devnull, os.O_PATH)
    _succeed(_LIBC.syscall(445, rules, 1, struct.pack("=Qi", write_file, null), 0), "a rule of Landlock")  # landlock_add_rule
    _succeed(_LIBC.syscall(446, rules, 0), "Landlock")  # landlock_restrict_self
    os.close(null)
    os.close(rules)
