"""Records: nothing that was computed is lost, and nothing is misread (trap T30)."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IDENTITY, ROOT

from mikv.records import VERSION, RecordError, RunFolder, read_environments, read_rows, write_atomically
from mikv.records.environment import code_state, environment, summarized


def folder(path: Path, identity: dict[str, Any] | None = None, config: str = "seed: 0\n") -> RunFolder:
    return RunFolder(path, IDENTITY if identity is None else identity, config)


def rows(*keys: str) -> list[dict[str, Any]]:
    return [{"key": key, "answer": f"'{key}'\n\u2028 世界 \r\x00", "nbytes": {"codes": 3}} for key in keys]


def file_with(path: Path, *lines: bytes) -> Path:
    """A run's samples.jsonl with these bytes."""
    with folder(path):
        file = path / "samples.jsonl"
        file.write_bytes(b"".join(lines))
    return file


def line(key: str, **more: Any) -> bytes:
    return json.dumps({"version": VERSION, "key": key, **more}).encode() + b"\n"


def python(code: str, *arguments: str, seed: str = "0") -> subprocess.Popen[str]:
    """A second process with this project on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- samples ---


def test_what_was_appended_is_read_back_by_key_also_in_a_later_run(tmp_path: Path) -> None:
    with folder(tmp_path / "run") as run:
        assert run.samples() == {}
        run.append(rows("a", "b"))
        run.append(rows("c"))
    with folder(tmp_path / "run") as again:
        (environment,) = read_environments(tmp_path / "run")
        named = {"version": VERSION, "environment": environment}
        assert again.samples() == {row["key"]: named | row for row in rows("a", "b", "c")}


def test_a_row_is_on_the_disk_before_append_returns(tmp_path: Path) -> None:
    """T30: kill -9 right after it loses nothing."""
    code = (
        "import os, sys, signal, pathlib; from mikv.records import *\n"
        "run = RunFolder(pathlib.Path(sys.argv[1]), {}, '').__enter__()\n"
        "run.append([{'key': 'a'}]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert python(code, str(tmp_path)).wait(timeout=30) == -9
    with folder(tmp_path, {}) as run:
        assert list(run.samples()) == ["a"]


@pytest.mark.parametrize("torn", [b'{"version": 1, "ke', line("b")[:-1], '{"key": "世'.encode()[:-1]])
def test_a_torn_last_line_is_cut_off_reported_and_computed_again(
    torn: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a line that only lacks its end: the next append would be glued to it."""
    file = file_with(tmp_path, line("a"), torn)
    with folder(tmp_path) as run:
        assert list(run.samples()) == ["a"]
        assert f"{file}: the last line was cut off" in capsys.readouterr().out
        run.append(rows("b"))
        assert list(run.samples()) == ["a", "b"]
    assert not capsys.readouterr().out


def test_who_only_reads_does_not_cut(tmp_path: Path) -> None:
    file = file_with(tmp_path, line("a"), b'{"torn')
    with pytest.raises(RecordError, match=r"samples\.jsonl:2 is no record"):
        list(read_rows(file))
    assert file.read_bytes() == line("a") + b'{"torn'


@pytest.mark.parametrize(
    "garbled",
    [b"garbage\n", b"\n", b"[1, 2]\n", b"\xff\xfe\n", line("x")[:9] + b"\n", b"{}\n"],
    ids=["text", "empty line", "no object", "no UTF-8", "half a line", "no key"],
)
def test_a_garbled_line_in_the_middle_is_refused_by_its_number_and_left_alone(garbled: bytes, tmp_path: Path) -> None:
    file = file_with(tmp_path, line("a"), garbled, line("c"))
    before = file.read_bytes()
    with folder(tmp_path) as run, pytest.raises(RecordError, match=r"samples\.jsonl:2 "):
        run.samples()
    assert file.read_bytes() == before


@pytest.mark.parametrize("position", [0, 1])
def test_records_of_another_version_are_refused_not_misread(position: int, tmp_path: Path) -> None:
    lines = [line("a"), line("b")]
    lines[position] = line("x", version=VERSION + 1)
    file_with(tmp_path, *lines)
    wanted = rf"samples\.jsonl:{position + 1} has records of version {VERSION + 1}, .* reads version {VERSION}"
    with folder(tmp_path) as run, pytest.raises(RecordError, match=wanted):
        run.samples()


# --- the folder ---


def test_a_folder_of_another_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.append(rows("a"))
    other = copy.deepcopy(IDENTITY) | {"seed": 1}
    other["task"]["lines"] = 30
    with pytest.raises(RecordError) as refused, folder(tmp_path, other):
        pass
    message = str(refused.value)
    assert "seed: 0 there, 1 now" in message
    assert "task.lines: 20 there, 30 now" in message
    assert message.count(" there, ") == 2
    assert "name=" in message
    assert json.loads((tmp_path / "run.json").read_text())["identity"] == IDENTITY


def test_a_refused_folder_is_free_again_for_the_right_run(tmp_path: Path) -> None:
    """In a notebook or a multirun the process lives on: a refusal must not keep the lock."""
    with folder(tmp_path):
        pass
    with pytest.raises(RecordError, match="another run"), folder(tmp_path, {"seed": 1}):
        pass
    with folder(tmp_path):
        pass


def test_tuples_of_an_identity_are_json_lists_not_a_difference(tmp_path: Path) -> None:
    for _ in range(2):
        with folder(tmp_path, {"shares": (0.2, 0.8)}):
            pass


def test_identity_and_configuration_are_kept(tmp_path: Path) -> None:
    with folder(tmp_path, config="a: 1\n"):
        pass
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"identity": IDENTITY}
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "a: 1\n"


def test_each_process_that_appends_notes_where_it_runs_and_its_rows_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume over two commits must show both."""
    for key, commit in (("a", "1" * 40), ("b", "2" * 40)):
        monkeypatch.setattr("mikv.records.folder.environment", lambda commit=commit: {"git_commit": commit, "git_dirty": True})
        with folder(tmp_path) as run:
            run.append(rows(key))
            run.append(rows(f"{key}2"))
    with folder(tmp_path) as run:
        assert len(run.samples()) == 4  # who only looks notes nothing
    noted = read_environments(tmp_path)
    assert [one["git_commit"][0] for one in noted.values()] == ["1", "2"]
    of_row = {row["key"]: noted[row["environment"]]["git_commit"][0] for row in read_rows(tmp_path / "samples.jsonl")}
    assert of_row == {"a": "1", "a2": "1", "b": "2", "b2": "2"}
    assert summarized(list(noted.values())).startswith("commit 11111111+ and 22222222+")


def test_a_list_says_on_which_device(tmp_path: Path) -> None:
    """Not what GPUs there are: a run may have been told to take the CPU."""
    with RunFolder(tmp_path, {"a": 1}, "a: 1\n", device="NVIDIA H100") as run:
        run.append(rows("a"))
    (noted,) = read_environments(tmp_path).values()
    assert summarized([noted]).endswith(", NVIDIA H100")
    assert summarized([noted | {"device": "cpu", "gpus": ["NVIDIA H100"], "cpu_capability": "AVX2"}]).endswith(", CPU AVX2")


def test_an_environment_says_what_numbers_depend_on() -> None:
    found = environment()
    assert re.fullmatch("[0-9a-f]{40}", str(found["git_commit"]))
    assert {"torch", "transformers", "lm-eval", "tokenizers", "triton"} <= found["packages"].keys()
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"git_dirty", "cuda", "gpus", "driver", "processor", "cpu_capability", "python"} <= found.keys()
    assert os.uname().nodename not in json.dumps(found)


def test_code_is_dirty_where_code_was_changed_not_where_a_figure_was_drawn(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert code_state(tmp_path) == {"git_commit": None, "git_dirty": None}
    code, figure = tmp_path / "mikv" / "code.py", tmp_path / "results" / "figure.png"
    for file in (code, figure):
        file.parent.mkdir()
        file.write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert code_state(code.parent)["git_dirty"] is False
    figure.write_text("after")
    assert code_state(code.parent)["git_dirty"] is False
    code.write_text("after")
    assert code_state(code.parent)["git_dirty"] is True


@pytest.mark.parametrize("precious", ["config.yaml", "notes.txt", ".git"])
def test_a_folder_that_is_no_runs_is_left_alone(precious: str, tmp_path: Path) -> None:
    """A user's own config.yaml would be replaced."""
    (tmp_path / precious).write_text("mine", encoding="utf-8")
    with pytest.raises(RecordError, match=f"is not the folder of a run .*{precious}"), folder(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == [precious]
    assert (tmp_path / precious).read_text(encoding="utf-8") == "mine"


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    with folder(tmp_path):
        pass
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecordError, match=r"run\.json"), folder(tmp_path):
        pass


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_cannot_be_written_says_where_to_go(place: str, tmp_path: Path) -> None:
    """A file in the way, as even root can't write there."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(RecordError, match=rf"{place} can't be written \(.+\).* choose another place with out="),
        folder(tmp_path / place),
    ):
        pass


@contextmanager
def held_by_another_process(path: Path) -> Iterator[None]:
    code = (
        "import sys, pathlib; from mikv.records import *\n"
        "with RunFolder(pathlib.Path(sys.argv[1]), {}, ''):\n    print('held', flush=True); sys.stdin.read()"
    )
    with python(code, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate()
        assert process.returncode == 0


def test_a_second_writer_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    with (
        held_by_another_process(tmp_path / "run"),
        pytest.raises(RecordError, match=r"another process is writing to .*run \(process \d+ on .+\); wait for it"),
        folder(tmp_path / "run", {}),
    ):
        pass
    with held_by_another_process(tmp_path / "run"), folder(tmp_path / "other"):
        pass
    with folder(tmp_path / "run", {}):  # the lock went with its process
        pass


# --- whole files ---


def test_a_summary_is_replaced_as_a_whole(tmp_path: Path) -> None:
    with folder(tmp_path) as run:
        run.write_summary([{"label": "full"}, {"label": "MiKV 世界"}])
        file = run.write_summary([{"label": "full", "value": 1.0}])
    assert [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] == [{"label": "full", "value": 1.0}]
    assert {f.name for f in tmp_path.iterdir()} == {"summary.jsonl", "run.json", "config.yaml", ".claim.1"}


def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full half-way through."""
    file = tmp_path / "summary.jsonl"
    write_atomically(file, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new content")
    assert file.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_who_has_the_summary_open_goes_on_reading_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "summary.jsonl"
    write_atomically(file, "old")
    with file.open(encoding="utf-8") as reader:
        write_atomically(file, "new")
        assert reader.read() == "old"
    assert file.read_text(encoding="utf-8") == "new"
