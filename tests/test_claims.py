"""Many writers on one file system without a lock server: one at a time in a folder; nothing lost, double or torn."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

from mikv.records import RecordError, RunFolder, read_rows

WRITERS = 8
LEASE = 1.5  # seconds; long enough for 8 processes on a busy machine of two processors to give signs of life

# Stands in for a job: for each folder of a tree in an order of its own, append what is missing, a few rows at a time.
WORKER = """
import pathlib, random, sys, time
from mikv.records import RecordError, RunFolder
tree, seed, keys, lease = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
rng = random.Random(seed)
folders = [tree / f"run{i}" for i in range(8)]
rng.shuffle(folders)
for folder in folders:
    try:
        with RunFolder(folder, {"of": folder.name}, "", lease) as run:
            done = run.samples()
            for key in range(keys):
                if f"{folder.name}/{key}" not in done:
                    run.append([{"key": f"{folder.name}/{key}", "answer": key * key, "long": "x" * 3000}])
            run.write_summary([{"label": "full", "n": keys}])
    except RecordError as error:
        assert "another process is writing" in str(error), error
        print("refused")
"""
# Enters one folder at the same moment as the others, and writes a row if it may.
RACER = """
import pathlib, sys, time
from mikv.records import RecordError, RunFolder
folder, name, lease = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
try:
    with RunFolder(folder, {}, "", lease) as run:
        run.append([{"key": name}])
        print("won", flush=True)
        sys.stdin.readline()
except RecordError as error:
    print("refused" if "another process" in str(error) else error, flush=True)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process with this project on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def race(folder: Path) -> list[str]:
    """What 8 processes that claim a folder at once are told, and who won stays until all know."""
    racers = [python(RACER, folder, name, LEASE) for name in range(WRITERS)]
    assert {answer(racer) for racer in racers} == {"ready"}
    for racer in racers:
        say(racer, "go")
    told = []
    for racer in racers:
        while (word := answer(racer)).startswith(f"{folder} is claimed"):
            pass
        told.append(word)
    for racer in racers:
        _, errors = racer.communicate("leave\n")
        assert racer.returncode == 0, errors
    return told


def marker(folder: Path, host: str, process: int) -> None:
    """The claim of a process that gives no sign of life."""
    folder.mkdir(exist_ok=True)
    (folder / ".claim.4").write_text(json.dumps({"host": host, "namespace": 1, "process": process, "started": 1.0}))


def taken_away(folder: Path) -> None:
    """As if another host had found the claim of this process expired, and given its own back."""
    (folder / ".claim.1").unlink()
    (folder / ".claim.2").write_text("{}\ngiven back\n")


def test_of_eight_that_come_at_once_one_writes_and_seven_are_refused(tmp_path: Path) -> None:
    for round_ in range(3):
        folder = tmp_path / str(round_)
        assert Counter(race(folder)) == {"won": 1, "refused": WRITERS - 1}
        assert len(list(read_rows(folder / "samples.jsonl"))) == 1
        assert [file.name for file in folder.glob(".claim*")] == [".claim.1"]


def test_of_eight_that_wait_for_a_dead_host_one_takes_over(tmp_path: Path) -> None:
    """Its process can't be asked: the claim must expire by silence, and only one may conclude so."""
    marker(tmp_path / "run", "elsewhere", 1)
    begun = time.monotonic()
    assert Counter(race(tmp_path / "run")) == {"won": 1, "refused": WRITERS - 1}
    assert time.monotonic() - begun > LEASE
    assert len(list(read_rows(tmp_path / "run" / "samples.jsonl"))) == 1


def test_a_claim_that_a_crash_of_the_machine_left_empty_expires_too(tmp_path: Path) -> None:
    (tmp_path / ".claim.3").touch()
    begun = time.monotonic()
    with RunFolder(tmp_path, {}, "", LEASE):
        assert LEASE < time.monotonic() - begun < 5 * LEASE


def test_who_died_on_this_host_is_succeeded_at_once(tmp_path: Path) -> None:
    """kill -9 and requeued on the same host: no minute of waiting on a GPU."""
    racer = python(RACER, tmp_path, "first", 600)
    assert answer(racer) == "ready"
    say(racer, "go")
    assert answer(racer) == "won"
    racer.kill()
    racer.communicate()
    begun = time.monotonic()
    with RunFolder(tmp_path, {}, "", 600) as run:
        assert list(run.samples()) == ["first"]
    assert time.monotonic() - begun < 5


def test_who_is_alive_gives_signs_of_life_while_it_computes(tmp_path: Path) -> None:
    """A batch takes longer than the lease: nobody else may conclude that its process is gone."""
    with RunFolder(tmp_path, {}, "", LEASE):
        before = (tmp_path / ".claim.1").stat().st_mtime_ns
        time.sleep(LEASE)
        assert (tmp_path / ".claim.1").stat().st_mtime_ns > before + LEASE / 2 * 1e9


def test_a_sleeper_is_succeeded_and_told_so_when_it_wakes(tmp_path: Path) -> None:
    """Suspended, or cut off from the file server, for longer than the lease."""
    code = """
import pathlib, sys
from mikv.records import RecordError, RunFolder
with RunFolder(pathlib.Path(sys.argv[1]), {}, "", float(sys.argv[2])) as run:
    run.append([{"key": "before"}])
    print("asleep", flush=True)
    sys.stdin.readline()
    for write in (lambda: run.append([{"key": "late"}]), lambda: run.write_summary([])):
        try:
            write()
        except RecordError as error:
            print(error)
"""
    sleeper = python(code, tmp_path, LEASE)
    assert answer(sleeper) == "asleep"
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(LEASE)
    with RunFolder(tmp_path, {}, "", LEASE) as successor:
        successor.append([{"key": "after"}])
        sleeper.send_signal(signal.SIGCONT)
        output, errors = sleeper.communicate("awake\n")
        told = rf"another process \(process {os.getpid()} on .+\) has taken over .*; it goes on there, and this one stops\n"
        assert re.fullmatch(f"({told}){{2}}", output), (output, errors)
        successor.write_summary([])  # whose claim is still there
    assert [row["key"] for row in read_rows(tmp_path / "samples.jsonl")] == ["before", "after"]


def test_a_line_written_in_the_moment_of_a_takeover_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It slept between the look at its claim and the write."""
    with RunFolder(tmp_path, {}, "") as sleeper:
        sleeper.append([{"key": "before"}])
        taken_away(tmp_path)
        with RunFolder(tmp_path, {}, "") as successor:
            successor.append([{"key": "after"}])
            monkeypatch.setattr(sleeper, "_still_mine", lambda: None)
            sleeper.append([{"key": "late"}])
            successor.append([{"key": "more"}])
    assert [row["key"] for row in read_rows(tmp_path / "samples.jsonl")] == ["before", "after", "more"]


def test_also_when_nobody_is_there_any_more_a_lost_claim_is_lost(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}, "") as sleeper:
        taken_away(tmp_path)
        with pytest.raises(RecordError, match="has taken over"):
            sleeper.append([{"key": "b"}])


def test_eight_writers_in_one_tree_some_killed_again_and_again(tmp_path: Path) -> None:
    """No sample twice, none missing, no line torn, and nobody waits for the dead."""
    keys, rng, killed = 12, random.Random(0), 0
    alive: dict[int, subprocess.Popen[str]] = {}
    ended: set[int] = set()
    seed, deadline = 0, time.monotonic() + 60
    while len(ended) < WRITERS and time.monotonic() < deadline:
        for writer in set(range(WRITERS)) - alive.keys() - ended:
            seed += 1
            alive[writer] = python(WORKER, tmp_path, seed, keys, LEASE)
        time.sleep(0.05 + 0.1 * rng.random())
        if killed < 20:
            victim = rng.choice(sorted(alive))
            alive[victim].send_signal(signal.SIGKILL)
            alive.pop(victim).communicate()
            killed += 1
        for writer, process in list(alive.items()):
            if process.poll() is not None:
                _, errors = alive.pop(writer).communicate()
                assert process.returncode == 0, errors
                ended.add(writer)
    assert killed == 20
    assert len(ended) == WRITERS
    last = python(WORKER, tmp_path, 0, keys, LEASE)  # what the killed left where everyone else was refused
    output, errors = last.communicate()
    assert (last.returncode, output.count("refused")) == (0, 0), errors
    for i in range(8):
        found = [row["key"] for row in read_rows(tmp_path / f"run{i}" / "samples.jsonl")]
        assert sorted(found) == sorted(f"run{i}/{key}" for key in range(keys))
        assert json.loads((tmp_path / f"run{i}" / "summary.jsonl").read_text()) == {"label": "full", "n": keys}
        assert len(list((tmp_path / f"run{i}").glob(".claim.*"))) == 1


def test_a_full_disk_is_said_and_leaves_no_half_line(tmp_path: Path) -> None:
    """A limit on the size of files: the kernel takes a part of the write, then refuses, as a full disk does."""
    code = """
import pathlib, resource, signal, sys
from mikv.records import RecordError, RunFolder
with RunFolder(pathlib.Path(sys.argv[1]), {}, "") as run:
    run.append([{"key": "a"}])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    try:
        run.append([{"key": "b", "long": "x" * 1000}])
    except RecordError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.append([{"key": "c"}])
"""
    output, errors = python(code, tmp_path).communicate()
    assert "samples.jsonl can't be written (File too large). Records that are there are kept: make room" in output, errors
    assert [row["key"] for row in read_rows(tmp_path / "samples.jsonl")] == ["a", "c"]


def test_a_read_only_folder_is_refused_before_work(tmp_path: Path) -> None:
    """In a process that is not root, for root may write everywhere; it stands in the folder, as others can't walk there."""
    code = """
import os, pathlib, sys
from mikv.records import RecordError, RunFolder
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    with RunFolder(pathlib.Path("run"), {}, ""):
        print("entered")
except RecordError as error:
    print(error)
"""
    tmp_path.chmod(0o555)
    try:
        output, errors = python(code, tmp_path).communicate()
    finally:
        tmp_path.chmod(0o755)
    assert "run can't be written (Permission denied)" in output, errors
    assert os.listdir(tmp_path) == []
