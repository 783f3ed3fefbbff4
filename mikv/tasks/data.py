"""Rows of published data sets: from local JSON-lines files, or from the Hugging Face hub.

Nothing of a data set comes with this project (licences differ). A `Source` says which file holds it and where else it can be
had; a task names its source and turns rows into samples.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
T = TypeVar("T")


class DataUnavailable(RuntimeError):
    """A task's data can't be had; the message says how to get them."""


@dataclass(frozen=True)
class Hub:
    """A data set of the hub.

    Args:
        repository: its name.
        rows: how many it has, after `only`.
        split: of the data set.
        configurations: whose rows are taken, one after the other; None = the only one.
        configuration_field: the file's field that says which configuration a row is of, where there are several.
        fields: the hub's names by the file's names, where they differ; several are joined.
        only: (field, value) of the rows that are taken.
    """

    repository: str
    rows: int
    split: str = "train"
    configurations: tuple[str | None, ...] = (None,)
    configuration_field: str | None = None
    fields: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    only: tuple[str, str] | None = None

    def load(self) -> list[Row]:
        """All rows, with the file's field names. Raises what `datasets` raises."""
        import datasets

        datasets.disable_progress_bars()
        rows: list[Row] = []
        for configuration in self.configurations:
            for row in datasets.load_dataset(self.repository, configuration, split=self.split):
                if self.only is None or row[self.only[0]] == self.only[1]:
                    of_it = {self.configuration_field: configuration} if self.configuration_field else {}
                    rows.append({**row, **self._renamed(row), **of_it})
        return rows

    def _renamed(self, row: Mapping[str, Any]) -> Row:
        return {
            ours: row.get(theirs) if isinstance(theirs, str) else "".join(row[name] for name in theirs)
            for ours, theirs in self.fields.items()
        }


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        name: for people.
        file: JSON lines, relative to the folder with the data.
        rows: how many the file has.
        required: fields that each row must have, and their types.
        origin: where the publishers keep it.
        hub: the same on the hub; None = it is not there.
    """

    name: str
    file: str
    rows: int
    required: Mapping[str, type]
    origin: str
    hub: Hub | None = None

    def load(self, data_dir: str | None) -> list[Row]:
        """All rows; their place in the list is their number.

        Args:
            data_dir: the folder that holds `file`, with or without the folder in its name; None = from the hub.

        Raises:
            DataUnavailable: no file, no hub; says what was tried and how to get it.
            ValueError: a row is not what it should be; says which one.
        """
        if data_dir is not None:
            file = self._find(Path(data_dir).expanduser())
            rows, where, published = read_rows(file, self.required), str(file), self.rows
        elif self.hub is not None:
            rows, where, published = self._from_hub(self.hub), self.hub.repository, self.hub.rows
        else:
            raise DataUnavailable(f"{self.name} is on no hub.\n{self._how_to_get()}")
        if len(rows) != published:
            print(f"note: {self.name} has {len(rows)} rows in {where}; the published set has {published}")
        return rows

    def _find(self, folder: Path) -> Path:
        tried = list(dict.fromkeys((folder / self.file, folder / Path(self.file).name)))
        for file in tried:
            if file.is_file():
                return file
        listed = " or ".join(str(file) for file in tried)
        raise DataUnavailable(f"{self.name}: there is no {listed}.\n{self._how_to_get()}")

    def _from_hub(self, hub: Hub) -> list[Row]:
        import datasets

        try:
            rows = hub.load()
        except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            raise DataUnavailable(
                f"{self.name} ({hub.repository}) can't be had here: {reason}\n{self._how_to_get()}"
            ) from error
        for number, row in enumerate(rows):
            _check(row, self.required, f"{hub.repository}, row {number}")
        return rows

    def _how_to_get(self) -> str:
        ways = [f"task.data_dir=/folder        (a folder with {self.file}: JSON lines with {_listed(self.required)})"]
        if self.hub is not None:
            ways.append(
                f"hf download --repo-type dataset {self.hub.repository}        (once, with internet, then without "
                "task.data_dir; gated data sets: accept the terms on the data set's page and `hf auth login` first)"
            )
        ways.append(f"{self.origin}        (the publishers' own files)")
        return "Ways to get it:\n" + "\n".join(f"  - {way}" for way in ways)


def read_rows(file: Path, required: Mapping[str, type]) -> list[Row]:
    """Rows of a JSON-lines file. Messages name a line and never show what it says.

    Raises:
        ValueError: the file is empty, or a line is no JSON object with the required fields; says which and what was found.
        OSError: it can't be read.
    """
    rows = []
    for where, row in numbered_rows(file):
        _check(row, required, where)
        rows.append(row)
    return rows


def numbered_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """FILE:LINE and object of each line: UTF-8, with or without a byte order mark, lines ended by LF or CR LF, empty lines left
    out. Raises as read_rows does."""
    empty = True
    with file.open("rb") as lines:  # bytes, so that a line that is no UTF-8 has a number; texts hold other line separators
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is no UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
            except (ValueError, RecursionError) as error:
                said = getattr(error, "msg", str(error))
                raise ValueError(f"{where} is no JSON ({said}); wanted: one object a line") from error
            _check(row, {}, where)
            empty = False
            yield where, row
    if empty:
        raise ValueError(f"{file} is empty; wanted: one JSON object a line")


def _check(row: Any, required: Mapping[str, type], where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is of type {type(row).__name__}; wanted: an object, {{...}}")
    wrong = [
        f"{name} is {'missing' if name not in row else f'of type {type(row[name]).__name__}'}"
        for name, kind in required.items()
        if not isinstance(row.get(name), kind) or (kind is int and isinstance(row[name], bool))
    ]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)}; wanted: {_listed(required)}")


def _listed(required: Mapping[str, type]) -> str:
    return ", ".join(f"{name} ({kind.__name__})" for name, kind in required.items())


def draw(rows: Sequence[T], limit: int | None, seed: int, name: str) -> list[T]:
    """The first `limit` rows (None = all) of an order that the seed decides: files are sorted by category.

    A longer limit extends a shorter one.
    """
    order = list(rows)
    random.Random(f"{name}/{seed}").shuffle(order)  # a str seed: the same on every machine and Python
    if limit is not None and limit > len(order):
        print(f"note: {name} has {len(order)} samples, {limit} were asked for")
    return order[:limit]


def cluster(text: str) -> str:
    """A name for a text that several samples share: their outcomes are not independent."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
