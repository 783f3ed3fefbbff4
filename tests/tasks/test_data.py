"""Where rows come from, and what is said when they don't."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import own_rows
import pytest
from conftest import SHARED_DATA

from mikv.lm import sys_ifeval
from mikv.tasks import context_qa, key_value, refusal, ruler_file, tensor_trust
from mikv.tasks.data import DataUnavailable, Hub, Source, draw
from mikv.work import memo_trap

SOURCES = [
    *tensor_trust.SOURCES.values(),
    *refusal.SOURCES.values(),
    refusal.XSTEST,
    *context_qa.SOURCES.values(),
    key_value.SOURCE,
    ruler_file.SOURCE,
    sys_ifeval.SOURCE,
    *memo_trap.SOURCES.values(),
]
BREAD = Source(
    "Bread", "kitchen/bread.jsonl", rows=2, required={"loaf": str, "weight": int}, origin="https://example.org/bread"
)
RYE, WHEAT = {"loaf": "rye", "weight": 3}, {"loaf": "wheat", "weight": 4}
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.file)


def kitchen(folder: Path, *rows: dict[str, Any] | str) -> str:
    file = folder / "kitchen" / "bread.jsonl"
    file.parent.mkdir()
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def test_a_file_is_found_in_the_tree_and_in_its_own_folder(tmp_path: Path) -> None:
    kitchen(tmp_path, RYE, WHEAT)
    assert BREAD.load(str(tmp_path)) == BREAD.load(str(tmp_path / "kitchen")) == [RYE, WHEAT]


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    row = {"loaf": "rye\u2028bread\x85\x0c", "weight": 3}
    assert BREAD.load(kitchen(tmp_path, json.dumps(row, ensure_ascii=False), WHEAT)) == [row, WHEAT]


def test_a_missing_file_is_named_with_all_that_was_tried_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable) as error:
        BREAD.load(str(tmp_path))
    for said in (
        f"{tmp_path}/kitchen/bread.jsonl or {tmp_path}/bread.jsonl",
        "task.data_dir=",
        "loaf (str)",
        "example.org/bread",
    ):
        assert said in str(error.value)


def test_without_a_folder_a_set_that_is_on_no_hub_says_so() -> None:
    with pytest.raises(DataUnavailable, match=r"Bread is on no hub(.|\n)*task\.data_dir=/folder"):
        BREAD.load(None)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"loaf": "secret', "is no JSON"),
        ('{"loaf": "secret"}', r"weight is missing; wanted: loaf \(str\), weight \(int\)"),
        ('{"loaf": "secret", "weight": "4"}', "weight is of type str; wanted"),
        ('{"loaf": null, "weight": true}', "loaf is of type NoneType, weight is of type bool; wanted"),
        ('["secret"]', "is of type list; wanted: an object"),
        ("3", "is of type int; wanted: an object"),
        ("null", "is of type NoneType; wanted: an object"),
        ("9" * 5000, "is no JSON"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_garbled_row_is_named_by_its_line_and_not_shown(line: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"bread\.jsonl:2.*{why}") as error:
        BREAD.load(kitchen(tmp_path, RYE, line))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n", b"\xef\xbb\xbf"], ids=["nothing", "a line", "lines", "a mark"])
def test_an_empty_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bread.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"bread\.jsonl is empty; wanted: one JSON object a line"):
        BREAD.load(str(tmp_path))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_no_utf_8_is_named_by_its_first_such_line(encoding: str, tmp_path: Path) -> None:
    text = json.dumps(RYE) + "\n" + json.dumps({"loaf": "brötchen", "weight": 1}, ensure_ascii=False) + "\n"
    (tmp_path / "bread.jsonl").write_bytes(text.encode(encoding))
    line = {"latin-1": 2, "utf-16": 1}[encoding]
    with pytest.raises(ValueError, match=rf"bread\.jsonl:{line} is no UTF-8 text \(byte .*save it as UTF-8"):
        BREAD.load(str(tmp_path))


def test_marks_and_line_ends_of_windows_and_empty_lines_change_nothing(tmp_path: Path) -> None:
    lines = [json.dumps(RYE), "", json.dumps(WHEAT), ""]
    (tmp_path / "bread.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert BREAD.load(str(tmp_path)) == [RYE, WHEAT]


def test_a_file_that_was_edited_is_read_anew(tmp_path: Path) -> None:
    folder = kitchen(tmp_path, RYE, WHEAT)
    BREAD.load(folder)
    file = tmp_path / BREAD.file
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text(file.read_text().replace("rye", "oat"))
    os.utime(file, ns=times)
    assert BREAD.load(folder) == [RYE | {"loaf": "oat"}, WHEAT]


def test_another_number_of_rows_than_published_is_said_and_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BREAD.load(kitchen(tmp_path, RYE, WHEAT, WHEAT))) == 3
    assert "Bread has 3 rows" in capsys.readouterr().out
    BREAD.load(kitchen(tmp_path / "kitchen", RYE, WHEAT))
    assert capsys.readouterr().out == ""


def hub_of(monkeypatch: pytest.MonkeyPatch, asked: list[Any], rows: dict[str | None, list[dict[str, Any]]]) -> None:
    def load_dataset(repository: str, configuration: str | None, **options: Any) -> list[dict[str, Any]]:
        asked.append((repository, configuration, options))
        return rows[configuration]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_rows_of_the_hub_get_the_files_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = [{"Name": "rye", "a": "x", "b": "y", "w": 1, "kind": "k"}, {"Name": "no", "a": "", "b": "", "w": 1, "kind": "other"}]
    hub_of(monkeypatch, asked, {"one": rows, "two": rows})
    hub = Hub(
        "some/bread",
        rows=2,
        split="test",
        configurations=("one", "two"),
        configuration_field="from",
        fields={"loaf": "Name", "ab": ("a", "b"), "weight": "w"},
        only=("kind", "k"),
    )
    source = Source("Bread", "bread.jsonl", rows=9, required={"loaf": str, "weight": int}, origin="", hub=hub)
    first, second = source.load(None)
    assert {name: first[name] for name in ("loaf", "ab", "weight", "from")} == {
        "loaf": "rye",
        "ab": "xy",
        "weight": 1,
        "from": "one",
    }
    assert second["from"] == "two"
    # code of the data set's own is never run: nothing but the split is said
    assert asked == [("some/bread", "one", {"split": "test"}), ("some/bread", "two", {"split": "test"})]


def test_a_field_that_the_hub_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, [], {None: [{"loaf": "rye"}]})
    source = Source("Bread", "bread.jsonl", rows=1, required={"loaf": str, "weight": int}, origin="", hub=Hub("some/bread", 1))
    with pytest.raises(ValueError, match="some/bread, row 0: weight is missing"):
        source.load(None)


@pytest.mark.parametrize(
    "error", [ConnectionError("no net"), ValueError("no configuration"), datasets.exceptions.DatasetsError("gone")]
)
def test_a_hub_that_can_not_be_had_says_how_else(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataUnavailable, match=rf"walledai/XSTest.*{error}(.|\n)*hf download --repo-type dataset walledai/XSTest"
    ):
        refusal.XSTEST.load(None)


def test_the_seed_decides_the_order_and_a_longer_limit_extends_a_shorter(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = list(range(50))
    ten = draw(numbers, 10, 3, "some")
    assert draw(numbers, 30, 3, "some")[:10] == ten != sorted(ten)
    assert draw(numbers, 10, 4, "some") != ten
    assert sorted(draw(numbers, None, 3, "some")) == numbers
    assert capsys.readouterr().out == ""
    assert len(draw(numbers, 60, 3, "some")) == 50
    assert "some has 50 samples, 60 were asked for" in capsys.readouterr().out


@every_source
def test_own_rows_have_each_sources_fields(source: Source, tmp_path: Path) -> None:
    assert source.load(own_rows.write(tmp_path)) == json.loads(json.dumps(own_rows.ROWS[source.file]))


@every_source
def test_the_published_file_has_the_rows_and_fields_that_are_said(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    if not (SHARED_DATA / source.file).is_file():
        pytest.skip(f"the published file is not here: {SHARED_DATA / source.file}")
    assert len(source.load(str(SHARED_DATA))) == source.rows
    assert capsys.readouterr().out == ""


def test_nothing_of_a_hub_is_imported_where_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    assert BREAD.load(kitchen(tmp_path, RYE, WHEAT))
