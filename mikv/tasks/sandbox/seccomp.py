"""A seccomp filter that lets through what a computation needs, and nothing else. Run by path: it imports nothing of mikv.

An allow-list, because a list of what is forbidden is never complete: the kernel gets new calls with every version. What is not
listed fails with EPERM. Calls that are newer than this list fail with ENOSYS, as on a kernel that doesn't have them, and so
does clone3, which hides its flags behind a pointer: libc then uses an older call.
"""

from __future__ import annotations

import ctypes
import os
import struct

# Numbers on x86_64 and on aarch64 (None = it has no such call), from the kernel's asm/unistd_64.h and asm-generic/unistd.h.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # memory and threads. A file in memory can't grow: RLIMIT_FSIZE
    **{"brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216)},
    **{"madvise": (28, 233), "memfd_create": (319, 279), "futex": (202, 98), "set_robust_list": (273, 99)},
    **{"get_robust_list": (274, 100), "rseq": (334, 293), "membarrier": (324, 283), "set_tid_address": (218, 96)},
    **{"arch_prctl": (158, None), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168)},
    **{"gettid": (186, 178), "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128)},
    # its own signals and timers
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136)},
    **{"rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None)},
    **{"alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "timerfd_create": (283, 85)},
    **{"timerfd_settime": (286, 86), "timerfd_gettime": (287, 87)},
    # time
    **{"clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101)},
    **{"gettimeofday": (96, 169), "time": (201, None), "times": (100, 153)},
    # files. Whether one may be opened for writing, Landlock or a read-only mount says
    **{"read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "preadv": (295, 69), "write": (1, 64), "writev": (20, 66)},
    **{"pwrite64": (18, 68), "pwritev": (296, 70), "lseek": (8, 62), "open": (2, None), "openat": (257, 56), "close": (3, 57)},
    **{"close_range": (436, 436), "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79)},
    **{"statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48)},
    **{"faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17)},
    **{"chdir": (80, 49), "fchdir": (81, 50), "fadvise64": (221, 223), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24)},
    **{"umask": (95, 166)},
    # pipes, and waiting for them
    **{"pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "select": (23, None)},
    **{"pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None)},
    **{"epoll_pwait": (281, 22), "eventfd2": (290, 19), "recvfrom": (45, 207), "shutdown": (48, 210)},
    # who and where it is
    **{"getpid": (39, 172), "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156)},
    **{"getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148)},
    **{"getresgid": (120, 150), "getgroups": (115, 158), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160)},
    **{"capget": (125, 90), "getrandom": (318, 278)},
}
# Calls of which only some arguments are harmless; `_conditions` says which.
CONDITIONAL: dict[str, tuple[int, int]] = {
    **{"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "prctl": (157, 167), "ioctl": (16, 29)},
    **{"fcntl": (72, 25), "socketpair": (53, 199), "sendto": (44, 206)},
}
CLONE = (56, 220)
CLONE3 = 435
UNKNOWN = 471  # the first number that no kernel used when this list was made (Linux 6.19)
X32 = 0x40000000  # with this bit, x86_64 takes calls of another numbering
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By machine: the column of its numbers, and its AUDIT_ARCH."""

EPERM, ENOSYS = 1, 38
_CLONE_THREAD = 0x10000
_Step = tuple[int, int, int, int]


def install() -> None:
    """Bind this process, its threads and what it executes to the filter, for good.

    Raises:
        OSError: this machine has no such thing, or no_new_privs is not set.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(ENOSYS, f"the calls of {machine} are not known")
    code = b"".join(struct.pack("HBBI", *step) for step in program(*MACHINES[machine]))
    steps = ctypes.create_string_buffer(code, len(code))
    whole = struct.pack("HP", len(code) // 8, ctypes.addressof(steps))
    pointer = ctypes.create_string_buffer(whole, len(whole))
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(word) for word in (2, ctypes.addressof(pointer), 0, 0)]  # SECCOMP_MODE_FILTER
    if libc.prctl(22, *words) != 0:  # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "seccomp is refused")


def program(column: int, architecture: int) -> list[_Step]:
    """The filter as BPF: (operation, steps to skip if true, steps to skip if false, operand)."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    call, arch, arguments = 0, 4, 16  # where they stand in struct seccomp_data
    allow, deny, missing = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x50000 | EPERM), (answer, 0, 0, 0x50000 | ENOSYS)

    def for_call(number: int, *steps: _Step) -> list[_Step]:
        return [(equal, 0, len(steps), number), *steps]

    def only(word: int, values: tuple[int, ...]) -> list[_Step]:
        """Go on if the word of the arguments has one of the values. Words are 32 bits, the lower half of an argument first."""
        checks = [(equal, len(values) - place, 0, value) for place, value in enumerate(values)]
        return [(load, 0, 0, arguments + 4 * word), *checks, deny]

    steps = [
        *((load, 0, 0, arch), (equal, 1, 0, architecture), deny),  # calls of another machine, with other numbers
        *((load, 0, 0, call), (at_least, 0, 1, X32), deny, (at_least, 0, 1, UNKNOWN), missing),
        *for_call(CLONE[column], (load, 0, 0, arguments), (any_bit, 0, 1, _CLONE_THREAD), allow, deny),
        *for_call(CLONE3, missing),
    ]
    for name, words in _conditions().items():
        checks = [step for word, values in words.items() for step in only(word, values)]
        steps += for_call(CONDITIONAL[name][column], *checks, allow)
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            steps += for_call(number, allow)
    return [*steps, deny]


def _conditions() -> dict[str, dict[int, tuple[int, ...]]]:
    """By call: which words of its arguments must have which values (word 2n = the lower half of argument n)."""
    itself = os.getpid()
    return {
        "kill": {0: (itself,)},
        "tgkill": {0: (itself,)},
        "prlimit64": {0: (0, itself)},  # of others it sets the limits, too
        "prctl": {0: (15, 16, 0x53564D41)},  # names of threads and memory; not PR_SET_PDEATHSIG, to outlive the parent
        # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: not those that change files
        "ioctl": {2: (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)},
        # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks on what others use, and no F_SETOWN, with
        # which the kernel sends any signal to anybody
        "fcntl": {2: (0, 1, 2, 3, 4, 1030)},
        "socketpair": {0: (1,)},  # AF_UNIX: an event loop has one to wake itself
        "sendto": {8: (0,), 9: (0,)},  # to its other end, not to an address
    }
