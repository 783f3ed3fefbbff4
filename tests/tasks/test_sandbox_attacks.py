"""What a program could do to others, tried on a process of the same user, and looked at from outside.

Each attack works where nothing confines it (the first test), and does nothing in any set of layers that is said to be enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from confinement import LINUX, WAYS, alive, processes
from conftest import ROOT

from mikv.tasks import sandbox
from mikv.tasks.sandbox import seccomp

if not LINUX:
    pytest.skip("the layers of confinement are Linux's", allow_module_level=True)

ROOTS = os.geteuid() == 0
LIBC = ctypes.CDLL(None, use_errno=True)
# Without root's capabilities, as the program has none: between unequal ones the kernel forbids much by itself.
VICTIM = f"""
import ctypes, sys, time
sys.path.insert(0, {str(ROOT)!r})
from mikv.tasks.sandbox import rights
rights.drop_capabilities()
print("ready", flush=True)
time.sleep(60)
"""


@dataclass
class World:
    """A process to be attacked, a folder with a file, servers; a word that others don't use, and one only the victim knows."""

    victim: subprocess.Popen[bytes]
    folder: Path
    word: str
    secret: str
    tcp: socket.socket
    unix: socket.socket

    def seen(self, told: str = "") -> dict[str, Any]:
        """All that an attack may change. told: what the program says."""
        pid = self.victim.pid
        state: dict[str, Any] = {
            "secret": self.secret in told,
            "alive": alive(pid),
            "left": bool(processes(f"{self.word}-left")),
        }
        if state["alive"]:
            limits = ("CPU", "AS", "NPROC", "NOFILE", "FSIZE", "DATA", "STACK", "CORE", "MEMLOCK", "SIGPENDING")
            state |= {name: resource.prlimit(pid, getattr(resource, f"RLIMIT_{name}")) for name in limits}
            state |= {"nice": os.getpriority(os.PRIO_PROCESS, pid), "affinity": os.sched_getaffinity(pid)}
            state["scheduler"] = os.sched_getscheduler(pid)
            state["stopped"] = "State:\tT" in Path(f"/proc/{pid}/status").read_text()
            state |= {name: Path(f"/proc/{pid}/{name}").read_text() for name in ("oom_score_adj", "coredump_filter")}
            state["io"] = LIBC.syscall({"x86_64": 252, "aarch64": 31}[os.uname().machine], 1, pid)  # ioprio_get
        state |= {kind: self.sysv(kind) for kind in ("shm", "msg", "sem")}
        state["keys"] = self.word in Path("/proc/keys").read_text() if Path("/proc/keys").exists() else False
        state["files"] = sorted((path.name, path.lstat().st_mode, path.lstat().st_mtime) for path in self.folder.rglob("*"))
        state["content"] = None
        with contextlib.suppress(OSError):  # it is gone, or may not be read any more
            state["content"] = (self.folder / "precious").read_text()
        state["memory files"] = [name for name in os.listdir("/dev/shm") if self.word in name]
        for name, server in (("tcp", self.tcp), ("unix", self.unix)):
            with contextlib.suppress(BlockingIOError):
                state[name] = server.recv(9) if name == "unix" else server.accept()[1]
        return state

    @staticmethod
    def sysv(kind: str) -> list[str]:
        return [line.split()[1] for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    word = f"mikv-{secrets.token_hex(8)}"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious").write_text("work")
    (folder / "empty").mkdir()
    command = [sys.executable, "-c", VICTIM]
    secret = secrets.token_hex(8)
    environment = {"SECRET": secret, "PYTHONDONTWRITEBYTECODE": "1"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as victim,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix,
    ):
        assert victim.stdout is not None
        victim.stdout.readline()
        tcp.setblocking(False)
        unix.bind(f"\0{word}")  # no file: in a name space of the network
        unix.setblocking(False)
        before = {kind: World.sysv(kind) for kind in ("shm", "msg", "sem")}
        yield World(victim, folder, word, secret, tcp, unix)
        victim.kill()
    for number in processes(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    for kind, remove in (("shm", LIBC.shmctl), ("msg", LIBC.msgctl), ("sem", lambda i, c, p: LIBC.semctl(i, 0, c, p))):
        for left in set(World.sysv(kind)) - set(before[kind]):
            remove(int(left), 0, None)
    for name in os.listdir("/dev/shm"):
        if word in name:
            os.remove(f"/dev/shm/{name}")
    if (key := LIBC.syscall({"x86_64": 249, "aarch64": 218}[os.uname().machine], b"user", word.encode(), None, -4)) > 0:
        LIBC.syscall({"x86_64": 250, "aarch64": 219}[os.uname().machine], 9, key, -4)  # KEYCTL_UNLINK


def attack(program: str, world: World) -> sandbox.Outcome:
    """Run a program; in it are V: the victim's number, W: the word, F: the folder, N: a number of a call by name, call()."""
    column = seccomp.MACHINES[os.uname().machine][0]
    names = {"V": world.victim.pid, "W": world.word, "F": str(world.folder), "PORT": world.tcp.getsockname()[1]}
    names["N"] = {name: numbers[column] for name, numbers in NUMBERS.items()}
    prelude = (
        "import ctypes, fcntl, os, resource, signal, socket, struct, sys, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    )
    prelude += "def call(name, *arguments):\n return libc.syscall(N[name], *(a if isinstance(a, bytes) else ctypes.c_long(a)"
    prelude += " for a in arguments))\n"
    prelude += "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return sandbox.run_program(prelude + program, sandbox.Limits(seconds=5))


PRELUDE = """
import ctypes, fcntl, os, resource, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    return libc.syscall(N[name], *(word if isinstance(word, bytes) else ctypes.c_long(word) for word in arguments))
"""
NUMBERS = {
    **{"prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "tgkill": (234, 131), "tkill": (200, 130)},
    **{"rt_sigqueueinfo": (129, 138), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117)},
    **{"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "add_key": (248, 217), "sched_setattr": (314, 274)},
}
ONE_CPU = len(os.sched_getaffinity(0)) == 1


# Name, program, and what it changes.
ATTACKS: list[tuple[str, str, str]] = [
    *(
        (f"limit {name}", f"resource.prlimit(V, resource.RLIMIT_{name}, (8, 8))", name)
        for name in ("CPU", "AS", "NOFILE", "FSIZE", "CORE", "SIGPENDING")
    ),
    ("limit by number", "call('prlimit64', V, 0, struct.pack('QQ', 1, 1), 0)", "CPU"),
    ("no processes", "resource.prlimit(V, resource.RLIMIT_NPROC, (0, 0))", "NPROC"),
    ("priority", "os.setpriority(os.PRIO_PROCESS, V, 5)", "nice"),
    ("priority by number", "call('setpriority', 0, V, 5)", "nice"),
    ("priority of a group", "os.setpriority(os.PRIO_PGRP, V, 5)", "nice"),
    ("priority of a user", "os.setpriority(os.PRIO_USER, os.getuid(), 5)", "nice"),
    ("scheduler", "os.sched_setscheduler(V, os.SCHED_IDLE, os.sched_param(0))", "scheduler"),
    ("scheduler by number", "call('sched_setattr', V, struct.pack('IIQiIQQQ', 48, 3, 0, 0, 0, 0, 0, 0), 0)", "scheduler"),
    ("affinity", "os.sched_setaffinity(V, {min(os.sched_getaffinity(V))})", "affinity"),
    ("priority of files", "call('ioprio_set', 1, V, 3 << 13)", "io"),
    ("first to be killed", "open(f'/proc/{V}/oom_score_adj', 'w').write('1000')", "oom_score_adj"),
    ("what it dumps", "open(f'/proc/{V}/coredump_filter', 'w').write('0')", "coredump_filter"),
    ("kill", "os.kill(V, 9)", "alive"),
    ("stop", "os.kill(V, signal.SIGSTOP)", "stopped"),
    ("kill a group", "os.killpg(V, 9)", "alive"),
    ("kill a thread", "call('tgkill', V, V, 9)", "alive"),
    ("kill a thread, older", "call('tkill', V, 9)", "alive"),
    (
        "kill with a word",
        "call('rt_sigqueueinfo', V, 9, struct.pack('iiiiii', 9, 0, -1, 0, os.getpid(), os.getuid()) + bytes(104))",
        "alive",
    ),
    ("kill by a file", "call('pidfd_send_signal', call('pidfd_open', V, 0), 9, 0, 0)", "alive"),
    (
        "kill by the kernel's hand",  # F_SETOWN, F_SETSIG and O_ASYNC: who reads is told with a signal
        "a, b = os.pipe()\nfcntl.fcntl(a, 8, V)\nfcntl.fcntl(a, 10, 9)\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(b, b'x')\ntime.sleep(0.2)",
        "alive",
    ),
    ("kill as a debugger", "call('ptrace', 0x4206, V, 0, 0x100000)", "alive"),
    ("read its environment", "raise ValueError(open(f'/proc/{V}/environ').read().replace('\\0', ' '))", "secret"),
    ("shared memory", "call('shmget', 0, 4096, 0o600)", "shm"),
    ("messages", "call('msgget', 0, 0o600)", "msg"),
    ("semaphores", "call('semget', 0, 1, 0o600)", "sem"),
    ("a file in memory", "open(f'/dev/shm/{W}', 'w')", "memory files"),
    ("a key", "call('add_key', b'user', W.encode(), b'x', 1, -4)", "keys"),
    ("connect", "socket.create_connection(('127.0.0.1', PORT), 1)", "tcp"),
    ("send", "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', '\\0' + W)", "unix"),
    ("send from a pair", "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0' + W)", "unix"),
    (
        "send from a pair, reconnected",
        "s = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]\ns.connect('\\0' + W)\ns.send(b'x')",
        "unix",
    ),
    ("a message from a pair", "socket.socketpair(1, 2)[0].sendmsg([b'x'], (), 0, '\\0' + W)", "unix"),
    ("remove", "os.remove(F + '/precious')", "files"),
    ("rename", "os.rename(F + '/precious', F + '/x')", "files"),
    ("remove a folder", "os.rmdir(F + '/empty')", "files"),
    ("make", "open(F + '/x', 'w')", "files"),
    ("make a folder", "os.mkdir(F + '/x')", "files"),
    ("make a link", "os.symlink('/', F + '/x')", "files"),
    ("make a hard link", "os.link(F + '/precious', F + '/x')", "files"),
    ("make a pipe", "os.mkfifo(F + '/x')", "files"),
    ("empty by opening", "open(F + '/precious', 'w')", "content"),
    ("empty", "os.truncate(F + '/precious', 0)", "content"),
    ("mode", "os.chmod(F + '/precious', 0)", "files"),
    ("mode by an open file", "os.fchmod(os.open(F + '/precious', os.O_RDONLY), 0o777)", "files"),
    ("time", "os.utime(F + '/precious', (0, 0))", "files"),
]
# The same, of processes left: their mark is in a command line. For all but root, RLIMIT_NPROC forbids them by itself.
LEFT = "os.execv('/bin/sh', ['sh', '-c', f'sleep 30; : {W}-left'])"
ATTACKS += [
    ("a daemon", f"if os.fork() == 0:\n os.setsid()\n if os.fork() == 0: {LEFT}\n os._exit(0)\ntime.sleep(0.3)", "left"),
    ("many processes", f"for _ in range(20):\n if os.fork() == 0:\n  os.setsid()\n  {LEFT}\ntime.sleep(0.3)", "left"),
]
TOOTHLESS = {"affinity": ONE_CPU, "a daemon": not ROOTS, "many processes": not ROOTS, "priority of a user": not ROOTS}
"""Attacks that do nothing even where nothing confines them, if that is so here; and one that would slow down a user's all."""
NEED_SECCOMP = {"a key"}
CASES = [pytest.param(*case, id=case[0]) for case in ATTACKS]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


@pytest.fixture
def unconfined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "LAYERS", ())
    monkeypatch.setattr(sandbox, "_unconfined", True)


@pytest.mark.usefixtures("unconfined")
@pytest.mark.parametrize(("name", "program", "changed"), CASES)
def test_where_nothing_confines_it_an_attack_works(name: str, program: str, changed: str, world: World) -> None:
    """Else the tests below would prove nothing."""
    if TOOTHLESS.get(name):
        pytest.skip("not here")
    before = world.seen()
    outcome = attack(program, world)
    time.sleep(0.05)
    after = world.seen(outcome.reason)
    assert changed in differences(before, after), outcome


@pytest.mark.parametrize("layers", WAYS)
@pytest.mark.parametrize(("name", "program", "changed"), CASES)
def test_a_confined_attack_changes_nothing(
    name: str, program: str, changed: str, layers: tuple[str, ...], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEED_SECCOMP and "seccomp" not in layers:
        pytest.skip("possible without seccomp, as its docstring says")
    monkeypatch.setattr(sandbox, "LAYERS", layers)
    before = world.seen()
    outcome = attack(program, world)
    time.sleep(0.05)
    after = world.seen(outcome.reason)
    assert differences(before, after) == [], (changed, outcome)
