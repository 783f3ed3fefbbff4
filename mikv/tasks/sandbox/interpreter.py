"""The script of the confined interpreter: it gives up rights, says so, executes the program, and says how that ended.

Its arguments are seconds, megabytes and layers of confinement; what it reads is a token, a line end, and the program. It is run
by path and imports nothing of mikv: the program finds nothing of it, and the start is short.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from importlib.machinery import SourceFileLoader
from typing import NoReturn

REASON_CHARACTERS = 200


def _main(seconds: int, memory_mb: int, layers: list[str]) -> NoReturn:
    token, _, text = sys.stdin.buffer.read().partition(b"\n")
    source = text.decode("utf-8", "surrogatepass")
    rights = _beside("rights")
    if "namespaces" in layers:
        rights.enter_namespaces(read_only="landlock" not in layers)
    _set_limits(seconds, memory_mb, processes="seccomp" in layers)
    if sys.platform == "linux":
        rights.drop_capabilities()
        rights.die_with_parent()
        rights.no_new_privileges()
    if "landlock" in layers:
        rights.seal_files()
    report = os.dup(1)
    write, leave = os.write, os._exit  # the program may replace them
    if "seccomp" in layers:
        _beside("seccomp").install()
    rights.silence()  # only now: until here errors are ours and somebody should read them
    main = types.ModuleType("__main__")  # dataclasses and others look names up there
    sys.modules["__main__"], sys.argv = main, [""]
    write(report, token + b":\n")
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), main.__dict__)  # not this file's __future__
        reason = "passed"
    except BaseException as error:
        reason = _reason(error)
    write(report, token + b" " + reason.encode(errors="backslashreplace") + b"\n")
    leave(0)


def _beside(name: str) -> types.ModuleType:
    """A module of this folder, which the program finds neither on the search path nor among the modules."""
    module = types.ModuleType(name)
    SourceFileLoader(name, os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")).exec_module(module)
    return module


def _reason(error: BaseException) -> str:
    """One line about an exception, whose text is the program's: long, broken, or an exception itself."""
    if isinstance(error, MemoryError):
        return "out of memory"
    reason = f"failed: {type(error).__name__}"
    with contextlib.suppress(BaseException):
        if text := str(error)[: 2 * REASON_CHARACTERS].strip():
            reason += f": {text}"
    return " ".join(reason[: 2 * REASON_CHARACTERS].split())[:REASON_CHARACTERS]


def _set_limits(seconds: int, memory_mb: int, processes: bool) -> None:
    """processes: whether something better forbids them: on Linux, RLIMIT_NPROC forbids threads too, and root nothing."""
    import resource

    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 64)
    # Beyond the wall clock, for several threads and for orphans. Two limits, because SIGXCPU, the first one's signal, says
    # what happened, and SIGKILL doesn't.
    _limit(resource.RLIMIT_CPU, seconds + 1, seconds + 2)
    if not processes:
        _limit(resource.RLIMIT_NPROC, 1)
    if sys.platform == "linux":  # macOS refuses or ignores the limit
        _limit(resource.RLIMIT_AS, memory_mb << 20)
        _limit(resource.RLIMIT_MSGQUEUE, 0)


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit; one that is lower already stays."""
    import resource

    highest = resource.getrlimit(kind)[1]
    if highest == resource.RLIM_INFINITY:  # -1
        highest = sys.maxsize
    resource.setrlimit(kind, (min(soft, highest), min(soft if hard is None else hard, highest)))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
