"""Names of identities and contents: the same everywhere for the same thing, another for another (trap T29)."""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import IDENTITY, ROOT

from mikv.fingerprint import content_fingerprint, fingerprint


def in_a_process(code: str, hash_seed: str) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- identities ---


def test_a_fingerprint_is_the_same_in_every_process_and_order() -> None:
    code = f"from mikv.fingerprint import fingerprint; print(fingerprint({IDENTITY!r}))"
    there = [in_a_process(code, hash_seed=seed) for seed in ("1", "2")]
    turned = {name: IDENTITY[name] for name in reversed(IDENTITY)}
    turned["task"] = {name: IDENTITY["task"][name] for name in reversed(IDENTITY["task"])}
    assert [*there, fingerprint(turned)] == [fingerprint(IDENTITY)] * 3


def test_a_fingerprint_is_what_it_was_when_the_records_were_written() -> None:
    """A change of the hash orphans every record there is: raise VERSION with it."""
    assert fingerprint({"seed": 0, "model": "a"}) == hashlib.sha256(b'{"model": "a", "seed": 0}').hexdigest()[:16]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values of a nested structure."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if inner is None:
        yield path
    else:
        for name, value in inner:
            yield from leaves(value, (*path, name))


@pytest.mark.parametrize("path", leaves(IDENTITY), ids=lambda path: ".".join(map(str, path)))
def test_any_changed_field_gives_another_fingerprint(path: tuple[Any, ...]) -> None:
    """T29: two runs that differ in one field get two ids."""
    changed = copy.deepcopy(IDENTITY)
    holder: Any = changed
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = "something else"
    assert fingerprint(changed) != fingerprint(IDENTITY)
    del holder[path[-1]]
    assert fingerprint(changed) != fingerprint(IDENTITY)


# --- contents ---


def weights(folder: Path, **files: str) -> Path:
    """A folder with files of some text: weights(path, config="a") writes path/config."""
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def test_a_content_has_one_name_wherever_it_lies_and_however_old_it_is(tmp_path: Path) -> None:
    here = weights(tmp_path / "here", config="a", sub__model="b")
    there = weights(tmp_path / "elsewhere" / "there", sub__model="b", config="a")  # written in another order
    os.utime(there / "config", (0, 0))
    assert content_fingerprint(here) == content_fingerprint(there)
    (tmp_path / "other").mkdir()
    file = (here / "config").rename(tmp_path / "config")
    before = content_fingerprint(file)
    assert content_fingerprint(file.rename(tmp_path / "other" / "config")) == before


@pytest.mark.parametrize(
    "other",
    [
        {"config": "A", "sub__model": "b"},
        {"config": "a", "sub__model": "B"},
        {"config": "a", "model": "b"},
        {"config": "a"},
        {"config": "a", "sub__model": "b", "tokenizer": "c"},
        {"config": "b", "sub__model": "a"},
    ],
)
def test_another_content_or_another_name_inside_gives_another_name(other: dict[str, str], tmp_path: Path) -> None:
    wanted = weights(tmp_path / "a", config="a", sub__model="b")
    assert content_fingerprint(wanted) != content_fingerprint(weights(tmp_path / "b", **other))


def test_a_file_is_told_from_another_by_its_content(tmp_path: Path) -> None:
    one, two = weights(tmp_path / "a", lines="a") / "lines", weights(tmp_path / "b", lines="b") / "lines"
    assert content_fingerprint(one) != content_fingerprint(two)


def test_checkpoints_that_differ_in_a_byte_are_two_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tunes of one model are equally large and may share nearly all of it; reading samples took them for one."""
    monkeypatch.setenv("MIKV_CACHE", str(tmp_path / "cache"))
    size = 2**24 + 1
    names = set()
    for place in (None, 0, 2**20 + 5000, size - 1):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
        names |= {content_fingerprint(folder), content_fingerprint(folder / "model.safetensors")}
    assert len(names) == 8


def test_a_large_file_keeps_its_name_elsewhere_and_when_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIKV_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(2**24 + 1))
    before = content_fingerprint(file)
    os.utime(file, (0, 0))
    assert content_fingerprint(file) == before
    (tmp_path / "there").mkdir()
    assert content_fingerprint(file.rename(tmp_path / "there" / "other.gguf")) == before


def test_texts_and_a_downloaders_notes_do_not_count(tmp_path: Path) -> None:
    """A better README of an adapter is no other adapter, nor is a second download of the same files."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = content_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("better")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "time.json").write_text("now")
    assert content_fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{}")
    assert content_fingerprint(tmp_path) != before
