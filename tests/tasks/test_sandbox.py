"""The sandbox: a program passes only if it ran to its end, and whatever it does stays inside."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from confinement import (
    LANDLOCK,
    LINUX,
    NAMESPACES,
    SECCOMP,
    WAYS,
    alive,
    descendants,
    needs_landlock,
    needs_linux,
    needs_namespaces,
    needs_seccomp,
    processes,
)
from conftest import ROOT

from mikv.tasks import sandbox
from mikv.tasks.sandbox import REASON_CHARACTERS, Limits, Outcome, run_program, seccomp

resource = pytest.importorskip("resource", reason="programs can't be confined on Windows")
DEFAULT = Limits()

HUMANEVAL = '''
from typing import List


def has_close_elements(numbers: List[float], threshold: float) -> bool:
    """ Check if in given list of numbers, are any two numbers closer to each other than given threshold.
    >>> has_close_elements([1.0, 2.0, 3.0], 0.5)
    False
    """
{completion}

METADATA = {{'author': 'jt', 'dataset': 'test'}}


def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False


check(has_close_elements)
'''
RIGHT = "    pairs = zip(sorted(numbers), sorted(numbers)[1:])\n    return any(b - a < threshold for a, b in pairs)\n"
WRONG = "    return True\n"


def passes(program: str, limits: Limits = DEFAULT) -> None:
    assert run_program(program, limits) == Outcome(True, "passed")


def fails(program: str, pattern: str, limits: Limits = DEFAULT) -> None:
    outcome = run_program(program, limits)
    assert not outcome.passed
    assert re.fullmatch(pattern, outcome.reason), outcome.reason


@pytest.fixture(params=WAYS)
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Each set of layers that confines a program, though the machine may offer more."""
    monkeypatch.setattr(sandbox, "LAYERS", request.param)
    return request.param


@pytest.fixture
def marker() -> Iterator[str]:
    """A word for command lines; processes that still have it when the test is over are ended."""
    word = f"mikv-{secrets.token_hex(8)}"
    yield word
    for number in processes(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


# --- the verdict ---


@pytest.mark.parametrize(("completion", "reason"), [(RIGHT, "passed"), (WRONG, "failed: AssertionError")])
def test_a_program_like_humanevals(completion: str, reason: str) -> None:
    assert run_program(HUMANEVAL.format(completion=completion)) == Outcome(reason == "passed", reason)


@pytest.mark.parametrize(
    ("program", "pattern"),
    [
        ("assert 1 + 1 == 3, 'no'", "failed: AssertionError: no"),
        ("[][0]", "failed: IndexError: list index out of range"),
        ("def f(:", r"failed: SyntaxError: .*line 1\)"),
        ("x = '\0'", "failed: (SyntaxError|ValueError): .*null bytes"),
        ("x = '\ud800'", "failed: UnicodeEncodeError: .*"),
        ("def f(): f()\nf()", "failed: RecursionError: .*"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", "killed: signal SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "timed out"),
    ],
)
def test_why_a_program_failed(program: str, pattern: str) -> None:
    fails(program, pattern)


@needs_linux
def test_a_signal_without_a_name() -> None:
    fails("import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 3)", r"killed: signal \d+")


@pytest.mark.parametrize("leave", ["sys.exit(0)", "os._exit(0)", "raise SystemExit"])
def test_to_leave_before_the_tests_is_to_fail(leave: str) -> None:
    fails(f"import os, sys; {leave}\nassert False", r"failed: (SystemExit.*|it left before its end \(status 0\))")


def test_a_program_cannot_claim_that_it_passed() -> None:
    write = "with contextlib.suppress(OSError): os.write(fd, b'passed\\n' + b' passed\\n:passed\\n')"
    fails(
        f"import contextlib, os\nprint('passed', flush=True)\nfor fd in range(64):\n {write}\nos._exit(0)", "failed: it left.*"
    )


@pytest.mark.parametrize("act", ["os.closerange(0, 64)\nwhile True: pass", "os.execv('/bin/sleep', ['sleep', '30'])"])
def test_a_program_that_can_no_longer_report_has_failed_at_once(act: str) -> None:
    began = time.monotonic()
    fails(f"import os\n{act}", "killed: signal SIGKILL|failed: PermissionError: .*")  # the latter: seccomp forbids execv
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("raise ValueError('a\\nb' * 10**6)", "failed: ValueError: a ba b"),
        ("raise type('E' * 10**6, (Exception,), {})", "failed: EEE"),
        ("raise ValueError('\\ud800' * 1000)", r"failed: ValueError: \ud800"),
        ("class E(Exception):\n def __str__(self): raise SystemExit(0)\nraise E", "failed: E"),
    ],
)
def test_a_reason_is_one_short_line(program: str, start: str) -> None:
    outcome = run_program(program)
    assert not outcome.passed
    assert outcome.reason.startswith(start)
    assert len(outcome.reason) <= REASON_CHARACTERS
    assert "\n" not in outcome.reason


def test_a_program_is_the_main_module_and_nobody_elses() -> None:
    """Not of a file with `from __future__ import annotations`, not beside the names of the sandbox."""
    passes("""
import pickle, sys
from dataclasses import dataclass, field
from typing import ClassVar

def f(x: 1 + 1): ...

@dataclass
class Größe:
    π: "float" = 3.14
    names: "ClassVar[list]" = []

assert __name__ == "__main__" and f.__annotations__ == {"x": 2}
assert pickle.loads(pickle.dumps(Größe(2.0))) == Größe(2.0), "日本語"
assert "Outcome" not in globals() and sys.argv == [""]
""")


def test_a_program_may_have_threads_and_an_event_loop() -> None:
    passes("""
import asyncio
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(abs, range(-4, 0))) == [4, 3, 2, 1]
asyncio.run(asyncio.sleep(0))
""")


def test_the_same_program_sees_the_same_hashes() -> None:
    first, second = (run_program("raise ValueError(hash('mikv'))") for _ in range(2))
    assert first == second
    assert re.fullmatch(r"failed: ValueError: -?\d+", first.reason)


# --- time and memory ---


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(3600)",
        "import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(3600)",
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E",
        "import os\nwhile True:\n for fd in range(3, 9):\n  try: os.write(fd, bytes(1 << 16))\n  except OSError: pass",
    ],
    ids=["loop", "sleep", "no signals", "no exceptions", "in its last word", "talks to the sandbox"],
)
def test_a_program_that_does_not_end_is_ended(program: str) -> None:
    began = time.monotonic()
    assert run_program(program, Limits(seconds=0.5)) == Outcome(False, "timed out")
    assert 0.5 <= time.monotonic() - began < 5


@needs_linux
def test_memory_is_limited() -> None:
    program = "x = bytearray(300 << 20)"
    assert run_program(program, Limits(memory_mb=256)) == Outcome(False, "out of memory")
    passes(program, Limits(memory_mb=512))
    assert run_program("x = []\nwhile True: x.append(bytes(1 << 20))", Limits(memory_mb=256)) == Outcome(False, "out of memory")


def test_limits_are_set_and_stay() -> None:
    passes(
        """
import resource as r
limit = lambda name: r.getrlimit(getattr(r, "RLIMIT_" + name))
assert limit("CORE") == (0, 0) and limit("FSIZE") == (0, 0), "files"
assert limit("NOFILE") == (64, 64) and limit("CPU") == (4, 5), "files and time"
for name in ("CORE", "FSIZE", "NOFILE", "CPU"):
    try: r.setrlimit(getattr(r, "RLIMIT_" + name), (1 << 20, 1 << 20))
    except (ValueError, OSError): pass
    else: assert False, "raised " + name
""",
        Limits(seconds=2.5),
    )


def test_a_lower_limit_of_the_parent_stays() -> None:
    code = "import resource; from mikv.tasks.sandbox import run_program\nresource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
    code += "print(run_program('import resource; assert resource.getrlimit(resource.RLIMIT_NOFILE) == (32, 32)').reason)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "passed"


def test_endless_output_fills_nothing() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = "import os, sys\nwhile True:\n for fd in (1, 2): os.write(fd, bytes(1 << 20))\n print('x' * (1 << 20))"
    assert run_program(program, Limits(seconds=1)) == Outcome(False, "timed out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (64 << 10) * (1 if LINUX else 1024)


@needs_linux
def test_root_gives_up_what_it_does_not_need() -> None:
    passes("""
sets = [line.split() for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm", "CapInh"))]
assert len(sets) == 3 and not any(int(bits, 16) & ~0b110 for _, bits in sets), sets
assert "NoNewPrivs:\\t1\\n" in open("/proc/self/status").read()
""")


# --- other processes ---


@needs_seccomp
@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(5): os.fork()",  # a bomb, but a small one
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing as m; m.get_context('spawn').Process(target=print).start()",
    ],
    ids=["fork", "subprocess", "spawn", "multiprocessing"],
)
def test_a_program_has_no_children(program: str) -> None:
    fails(program, "failed: PermissionError: .*")


@pytest.mark.skipif(not SECCOMP and os.geteuid() == 0, reason="without a filter, RLIMIT_NPROC doesn't bind root")
def test_nobody_outlives_a_program(marker: str) -> None:
    """Not a child, and not a grandchild in a session of its own; whether they can't begin or are killed."""
    run_program(f"""
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv("/bin/sh", ["sh", "-c", "sleep 30; : {marker}"])
        os.execv("/bin/sh", ["sh", "-c", "sleep 30; : {marker}"])
finally:
    time.sleep(0.3)
""")
    assert processes(marker) == []


def test_the_process_group_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    """Where children can't be forbidden: here those of an interpreter that starts one before it gives up rights."""
    use_interpreter(f"sh -c 'sleep 30; : {marker}' & exec", tmp_path, monkeypatch)
    passes("import time; time.sleep(0.3)")
    time.sleep(0.1)
    assert processes(marker) == []


@needs_seccomp
@pytest.mark.parametrize(
    "call",
    ["os.kill(os.getppid(), 0)", "os.kill(0, 0)", "os.kill(-1, 0)", "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)"],
)
def test_a_program_signals_nobody_else(call: str) -> None:
    fails(f"import os, signal; {call}", "failed: PermissionError: .*")


@needs_seccomp
def test_every_call_that_is_not_listed_is_denied() -> None:
    """All numbers are tried, with zeros: a call that gets through says something else than EPERM, or does not come back."""
    column = seccomp.MACHINES[platform.machine()][0]
    known = [*seccomp.ALLOWED.values(), *seccomp.CONDITIONAL.values(), seccomp.CLONE]
    listed = {numbers[column] for numbers in known}
    if platform.machine() == "x86_64":
        listed |= {335, 336}  # uretprobe and uprobe: no filter sees them, and from elsewhere than a probe they are SIGILL
    passes(f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def error(number):
    assert libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1, number
    return errno.errorcode[ctypes.get_errno()]
answers = {{number: error(number) for number in range({seccomp.UNKNOWN + 50}) if number not in {listed}}}
missing = [number for number, answer in answers.items() if answer == "ENOSYS"]
assert missing == [{seccomp.CLONE3}, *range({seccomp.UNKNOWN}, {seccomp.UNKNOWN + 50})], missing
assert set(answers.values()) == {{"EPERM", "ENOSYS"}}, answers
""")


@needs_seccomp
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("clone", "0, 0, 0, 0, 0"),
        ("kill", "1, 0"),
        ("tgkill", "1, 1, 0"),
        ("prlimit64", "1, 0, 0, 0"),
        ("prctl", "1, 0, 0, 0, 0"),  # PR_SET_PDEATHSIG: to outlive the parent
        ("ioctl", "0, 0x5412, 0"),  # TIOCSTI: to type on a terminal
        ("fcntl", "0, 8, 1"),  # F_SETOWN: the kernel signals on the program's behalf
        ("fcntl", "0, 6, 0"),  # F_SETLK: to lock what others use
        ("socketpair", "2, 1, 0, 0"),
        ("sendto", "0, 0, 0, 0, 1, 0"),
        ("sendto", "0, 0, 0, 0, 1 << 32, 0"),
    ],
)
def test_of_some_calls_the_arguments_decide(name: str, arguments: str) -> None:
    numbers = {**seccomp.CONDITIONAL, "clone": seccomp.CLONE}[name]
    number = numbers[seccomp.MACHINES[platform.machine()][0]]
    passes(f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(*(ctypes.c_ulong(word) for word in ({number}, {arguments}))) == -1
assert ctypes.get_errno() == 1, ctypes.get_errno()
""")


@needs_seccomp
def test_calls_of_another_numbering_are_denied() -> None:
    """x86_64's third one, x32; on other machines there is no such call."""
    number = seccomp.X32 | seccomp.ALLOWED["getpid"][seccomp.MACHINES[platform.machine()][0]]
    passes(f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall({number}) == -1 and ctypes.get_errno() == 1, ctypes.get_errno()
""")


# Calls that may get into no list, on x86_64 and aarch64 (None = it has no such call).
DANGEROUS: dict[str, tuple[int | None, int | None]] = {
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendmsg": (46, 211), "sendmmsg": (307, 269)},
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117)},
    **{"tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434)},
    **{"pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "kcmp": (312, 272), "process_madvise": (440, 440)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_mrelease": (448, 448)},
    **{"setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274)},
    **{"sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "setrlimit": (160, 164), "migrate_pages": (256, 238)},
    **{"shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "io_uring_setup": (425, 425)},
    **{"perf_event_open": (298, 241), "userfaultfd": (323, 282), "mount": (165, 40), "umount2": (166, 39)},
    **{"mount_setattr": (442, 442), "fsopen": (430, 430), "open_tree": (428, 428), "move_mount": (429, 429)},
    **{"pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "sethostname": (170, 161)},
    **{"clock_settime": (227, 112), "settimeofday": (164, 170), "adjtimex": (159, 171), "clock_adjtime": (305, 266)},
    **{"reboot": (169, 142), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273)},
    **{"swapon": (167, 224), "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116), "iopl": (172, None)},
    **{"flock": (73, 32), "truncate": (76, 45), "unlinkat": (263, 35), "fchmod": (91, 52), "fchmodat": (268, 53)},
    **{"fchown": (93, 55), "fchownat": (260, 54), "utimensat": (280, 88), "setxattr": (188, 5), "setuid": (105, 146)},
    **{"open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "personality": (135, 92), "capset": (126, 91)},
}


def test_what_is_dangerous_is_in_no_list() -> None:
    for column in (0, 1):
        listed = {numbers[column] for numbers in (*seccomp.ALLOWED.values(), *seccomp.CONDITIONAL.values())} - {None}
        assert [name for name, numbers in DANGEROUS.items() if numbers[column] in listed] == []


def test_the_list_agrees_with_the_kernels_headers() -> None:
    """Of both machines, where their headers are installed."""
    names = {
        **DANGEROUS,
        **seccomp.ALLOWED,
        **seccomp.CONDITIONAL,
        "clone": seccomp.CLONE,
        "clone3": (seccomp.CLONE3, seccomp.CLONE3),
    }
    headers = {0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 1: Path("/usr/include/asm-generic/unistd.h")}
    found = {column: file.read_text() for column, file in headers.items() if file.exists()}
    if not found:
        pytest.skip("the kernel's headers are not installed")
    for column, text in found.items():
        for name, numbers in names.items():
            defined = re.search(rf"#define __NR(?:3264)?_{name}\s+(\d+)$", text, re.MULTILINE)
            if defined or numbers[column] is None:
                assert (int(defined[1]) if defined else None) == numbers[column], (name, headers[column])


@needs_linux
def test_a_program_dies_with_its_parent(tmp_path: Path, layers: tuple[str, ...]) -> None:
    """With all that stand between them, and though it tries to get rid of the signal that kills it then."""
    deaf = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(60)"
    code = f"from mikv.tasks import sandbox; sandbox.LAYERS = {layers}; sandbox.permit()\n"
    code += f"print('ready', flush=True); sandbox.run_program({deaf!r})"
    environment = {"TMPDIR": str(tmp_path)}  # a parent that is killed doesn't remove its temporary files
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        time.sleep(1)  # long enough for the interpreter to give up rights
        children = list(descendants(parent.pid))
        parent.kill()
    deadline = time.monotonic() + 5
    while (left := [child for child in children if alive(child)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert len(children) == (3 if "namespaces" in layers else 1)
    assert left == []


ADOPTING = """
import ctypes, os
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to this process
from mikv.tasks import sandbox
sandbox.LAYERS = {layers}
for program in ("pass", "import os; os._exit(3)", "while True: pass", "import os; os.closerange(0, 64)\\nwhile True: pass"):
    print(sandbox.run_program(program, sandbox.Limits(seconds=0.3)).reason)
try:
    print("left:", os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("nobody")
"""


@needs_linux
def test_no_zombies_are_left(layers: tuple[str, ...]) -> None:
    """Not to whoever adopts orphans: the first process of many containers buries nobody."""
    command = [sys.executable, "-c", ADOPTING.format(layers=layers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    left_early = "failed: it left before its end (status 3)"
    assert done.stdout.splitlines() == ["passed", left_early, "timed out", "killed: signal SIGKILL", "nobody"], done.stderr


# --- network and files ---


@needs_seccomp
def test_the_network_is_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        fails(f"import socket; socket.create_connection({server.getsockname()!r}, 1)", "failed: PermissionError: .*")
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "PYTHONPATH", "HOME"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    known = {"PYTHONHASHSEED", "LD_LIBRARY_PATH", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # the last two are Python's, macOS's
    passes(f"import os; assert set(os.environ) <= {known} and os.environ['LD_LIBRARY_PATH'] == '/nowhere', set(os.environ)")


@needs_landlock
def test_the_environment_of_the_parent_cannot_be_read() -> None:
    fails("import os; open(f'/proc/{os.getppid()}/environ').read()", "failed: PermissionError: .*")


def test_a_program_sees_the_standard_library_alone() -> None:
    passes("import sys; assert not any('site-packages' in p or 'mikv' in p for p in sys.path) and '' not in sys.path, sys.path")


def test_the_standard_files_lead_nowhere() -> None:
    """Above all not to the file that the interpreter read: the token stands in it."""
    passes("""
import os, sys
os.lseek(0, 0, os.SEEK_SET)
assert os.read(0, 9) == b"" and sys.stdin.read() == ""
assert {os.fstat(fd).st_rdev for fd in (0, 1, 2)} == {os.stat(os.devnull).st_rdev}
""")


def test_the_working_directory_is_empty_and_goes() -> None:
    outcome = run_program("import os; assert os.listdir() == []; raise ValueError(os.getcwd())")
    directory = Path(outcome.reason.removeprefix("failed: ValueError: "))
    assert directory.is_absolute()
    assert directory != Path.cwd()
    assert not directory.exists()


def test_a_program_writes_not_one_byte() -> None:
    fails("with open('big', 'wb') as file: file.write(bytes(1 << 30))", "failed: (PermissionError|OSError): .*")
    if LINUX:  # Landlock doesn't see these
        fails("import os; os.write(os.memfd_create('big'), b'x')", r"failed: OSError: .*File too large")


@needs_landlock
@pytest.mark.parametrize(
    "act",
    [
        "os.remove({0!r})",
        "os.rename({0!r}, {0!r} + '2')",
        pytest.param("os.truncate({0!r}, 0)", marks=pytest.mark.skipif(LANDLOCK < 3, reason="needs Linux 6.2")),
        "open({0!r}, 'w')",
        "open({0!r}, 'r+')",
        "open('x', 'w')",
        "os.mkdir({0!r} + '2')",
        "os.symlink('/', {0!r} + '2')",
        "os.rmdir(os.path.dirname({0!r}) + '/empty')",
    ],
)
def test_files_are_safe(act: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("work")
    fails(f"import os; {act.format(str(precious))}", "failed: (PermissionError|OSError): .*")
    assert sorted(os.listdir(tmp_path)) == ["empty", "precious"]
    assert precious.read_text() == "work"


OLD_KERNEL = """
import os, sys
from mikv.tasks.sandbox import rights
def refuse(*_, **__): raise OSError("there is no mount_setattr")
rights._set_mount_flags = refuse
rights.enter_namespaces(read_only=True)
rights.drop_capabilities()
for act in (lambda: open(sys.argv[1], "w"), lambda: os.chmod(sys.argv[1], 0), lambda: open("/dev/shm/mikv-file", "w")):
    try: act()
    except OSError as error: assert error.errno == 30, error
    else: os._exit(7)
open(os.devnull, "w").write("x")
os._exit(0)
"""


@needs_namespaces
def test_before_linux_5_12_mounts_are_made_read_only_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "a folder with blanks"
    file.write_text("work")
    done = subprocess.run([sys.executable, "-c", OLD_KERNEL, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "work"


def test_devnull_may_be_written(layers: tuple[str, ...]) -> None:
    assert layers == sandbox.LAYERS
    passes("import contextlib, os\nwith open(os.devnull, 'w') as n, contextlib.redirect_stdout(n): print('x')")


# --- what is not the program's doing ---


def use_interpreter(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put words of the shell before the interpreter."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\n{words} "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_broken_interpreter_is_not_a_failed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_interpreter("echo no libpython >&2; exit 127", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"status 127\): no libpython"):
        run_program("pass")


def test_of_an_interpreters_output_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_interpreter("head -c 1000000 /dev/zero; echo the end; exit 1", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="the end") as caught:
        run_program("pass")
    assert len(str(caught.value)) < sandbox.OUTPUT_BYTES + 100


def test_an_interpreter_that_hangs_is_not_a_failed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_interpreter("sleep 20; exec", tmp_path, monkeypatch)
    monkeypatch.setattr(sandbox, "STARTUP_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match="did not start"):
        run_program("pass")


def test_the_start_of_the_interpreter_is_not_the_programs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_interpreter("sleep 1; exec", tmp_path, monkeypatch)
    passes("import time; time.sleep(0.2)", Limits(seconds=0.8))


# --- what machines offer ---


@needs_linux
def test_what_this_machine_offers_is_found() -> None:
    offered = [name for name, there in (("seccomp", SECCOMP), ("landlock", LANDLOCK >= 1), ("namespaces", NAMESPACES)) if there]
    assert sandbox.confinement().layers == tuple(offered), sandbox.confinement()


@needs_linux
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv, to be as in a container")
def test_where_namespaces_are_refused_the_other_layers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_interpreter("exec setpriv --bounding-set=-sys_admin", tmp_path, monkeypatch)
    found = sandbox.confinement()
    assert "namespaces" not in found.layers
    assert re.fullmatch(r"namespaces: PermissionError: .*namespaces refused: Operation not permitted", found.refused[-1])
    if SECCOMP and LANDLOCK >= 1:
        assert found.holes == ""
        passes("pass")


def test_a_machine_that_confines_warns_of_nothing(layers: tuple[str, ...]) -> None:
    assert layers == sandbox.LAYERS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sandbox.permit()
        passes("pass")


@pytest.mark.parametrize(
    ("offered", "hole"),
    [((), "reach the network"), (("landlock",), "reach the network"), (("seccomp",), "remove files")],
)
def test_a_machine_that_does_not_confine_is_refused_unless_the_user_insists(
    offered: tuple[str, ...], hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "LAYERS", offered)
    for ask in (sandbox.permit, lambda: run_program("pass")):
        with pytest.raises(sandbox.ConfinementError, match=f"{hole}.*allow_code_execution=unconfined"):
            ask()
    with pytest.warns(RuntimeWarning, match=f"may .*{hole}"):
        sandbox.permit(unconfined=True)
    try:
        passes("pass")
    finally:
        with pytest.raises(sandbox.ConfinementError):  # the next run is asked anew
            sandbox.permit()


@needs_linux
@pytest.mark.skipif(not shutil.which("setarch"), reason="needs setarch, to be another machine")
def test_a_machine_without_a_filter_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_interpreter("exec setarch i686", tmp_path, monkeypatch)
    monkeypatch.setattr(sandbox, "LAYERS", ("seccomp", "landlock"))
    monkeypatch.setattr(sandbox, "_unconfined", False)
    with pytest.raises(sandbox.ConfinementError, match=r"seccomp: .*the calls of i686 are not known"):
        sandbox.permit()
    with pytest.warns(RuntimeWarning, match="may reach the network, stop and slow down other processes"):
        sandbox.permit(unconfined=True)
    passes("import resource; assert resource.getrlimit(resource.RLIMIT_NPROC) == (1, 1)")


@needs_linux
@pytest.mark.skipif(not shutil.which("setarch"), reason="needs setarch, to be another machine")
def test_a_layer_that_fails_later_is_no_weaker_confinement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine offered when it was asked: the program does not run without it."""
    found = sandbox.Confinement(("seccomp", "landlock"), ())
    monkeypatch.setattr(sandbox, "_permitted", lambda: found)
    use_interpreter("exec setarch i686", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"(?s)did not start.*the calls of i686 are not known"):
        run_program("pass")


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        with pytest.raises(RuntimeError, match="Windows"):
            run_program("pass")


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": float("inf")}, {"seconds": float("nan")}, {"memory_mb": 63}])
def test_limits_must_make_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs some time"):
        Limits(**wrong)  # type: ignore[arg-type]
