"""Digests of whole files: always those of the content that is there, read no oftener than needed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mikv import digests
from mikv.digests import cache_dir, file_digest


class Reads:
    """Counts how often a file was read from its first byte to its last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        self._read = hashlib.file_digest
        monkeypatch.setattr(hashlib, "file_digest", self)

    def __call__(self, *arguments: object) -> object:
        self.number += 1
        return self._read(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file, and a cache of its own; files are settled as soon as they are written."""
    monkeypatch.setenv("MIKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_NS", -(2**62))
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    return file


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def right(file: Path) -> bool:
    return file_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_is_read_once(file: Path, reads: Reads) -> None:
    assert right(file)
    assert right(file)
    assert reads.number == 1


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"other")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)


def overwrite_and_set_the_time_back(file: Path) -> None:
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"other")
    os.utime(file, ns=times)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(b"longer than it was"),
        lambda file: file.write_bytes(b"other"),
        lambda file: os.utime(file, (0, 0)),
        replace,
        overwrite_and_set_the_time_back,
    ],
    ids=["another size", "the same size", "touched", "another file, same size and time", "time set back"],
)
def test_a_file_that_may_have_changed_is_read_again(change: object, file: Path, reads: Reads) -> None:
    assert right(file)
    change(file)  # type: ignore[operator]
    assert right(file)
    assert reads.number == 2


def test_a_file_that_was_just_written_is_not_remembered(file: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could change again within a tick of the file system's clock."""
    monkeypatch.setattr(digests, "SETTLED_NS", 60 * 10**9)
    assert right(file)
    assert right(file)
    assert reads.number == 2


def test_a_file_that_changes_while_it_is_read_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashlib.file_digest

    def growing(*arguments: object) -> object:
        file.write_bytes(b"still being downloaded")
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", growing)
    with pytest.raises(ValueError, match=f"{file} was changed while it was read"):
        file_digest(file)


@pytest.mark.parametrize("note", ["", "[]", '{"stamp": 1}', "{"])
def test_a_broken_note_is_no_answer(note: str, file: Path, reads: Reads) -> None:
    file_digest(file)
    (written,) = (cache_dir() / "sha256").iterdir()
    written.write_text(note)
    assert right(file)
    assert reads.number == 2


def test_a_cache_that_can_not_be_written_costs_time_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIKV_CACHE", str(file / "no folder"))
    assert right(file)


def test_it_is_said_when_a_large_file_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file_digest(file)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(digests, "TOLD_BYTES", 3)
    os.utime(file, (0, 0))
    file_digest(file)
    assert capsys.readouterr().out == "reading weights (0.0 GB) for its fingerprint, once ...\n"
    file_digest(file)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({"MIKV_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/mikv"), ({}, "/home/me/.cache/mikv")],
)
def test_what_can_be_made_again_goes_to_the_users_cache(
    environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MIKV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert str(cache_dir()) == wanted
