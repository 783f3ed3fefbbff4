"""A tree of runs: what is in it, are its records whole, and how do two trees become one."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mikv.records.files import RecordError, Row, read_rows
from mikv.records.folder import RunFolder, read_identity

_FREE = ("seconds", "reader")
"""Fields of a sample in which two computations of one key may differ."""


@dataclass(frozen=True)
class Problem:
    """grave: records can't be read or contradict each other. Else: what the run's command repairs, or has still to do."""

    folder: Path
    what: str
    grave: bool = True


def runs(tree: Path) -> list[Path]:
    """Folders of runs, at any depth; what is hidden (.sweeps) is none.

    Raises:
        RecordError: there is no such folder.
    """
    if not tree.is_dir():
        raise RecordError(f"{tree} is no folder")
    found = (file.parent for file in tree.rglob("run.json"))
    return sorted(folder for folder in found if not any(part.startswith(".") for part in folder.relative_to(tree).parts))


def rows_of(tree: Path, file: str, where: Mapping[str, str]) -> Iterator[Row]:
    """Rows of all runs, each with its `run`, that have the wanted values.

    Args:
        tree: of runs.
        file: samples.jsonl or summary.jsonl.
        where: field -> value as text; a dot goes into an object (nbytes.codes).

    Raises:
        RecordError: a line is no record.
    """
    for folder in runs(tree):
        for row in read_file(folder / file):
            row = {"run": str(folder.relative_to(tree)), **row}
            if all(str(_field(row, name)) == value for name, value in where.items()):
                yield row


def read_file(file: Path) -> list[Row]:
    """Rows of samples.jsonl or summary.jsonl; none where it does not exist."""
    if not file.exists():
        return []
    if file.name == "samples.jsonl":
        return list(read_rows(file, torn=lambda _: None))
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} is damaged ({error}); the run's command writes it anew from its samples") from error


def _field(row: Row, name: str) -> object:
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check(folder: Path) -> list[Problem]:
    """What is wrong with the records of a run."""
    problems: list[Problem] = []
    samples: list[Row] = []
    summary: list[Row] = []
    try:
        read_identity(folder)
        file = folder / "samples.jsonl"
        if file.exists():
            samples = list(read_rows(file, torn=lambda message: problems.append(Problem(folder, message, grave=False))))
        summary = read_file(folder / "summary.jsonl")
    except RecordError as error:
        return [*problems, Problem(folder, str(error))]
    by_key: dict[str, Row] = {}
    for row in samples:
        before = by_key.setdefault(row["key"], row)
        if before is not row:
            same = _alike(before, row)
            what = f"{row['key']} is there twice, {'alike' if same else 'with two outcomes'}"
            problems.append(Problem(folder, what, grave=not same))
    there = Counter(row["label"] for row in by_key.values() if "label" in row)
    for row in summary:
        if there[row["label"]] < row.get("samples", 0):
            what = f"the summary counts {row['samples']} samples of {row['label']}, and {there[row['label']]} are there"
            problems.append(Problem(folder, what))
    if not summary:
        problems.append(Problem(folder, f"unfinished: {len(by_key)} samples and no summary", grave=False))
    return problems


def merge(source: Path, target: Path) -> list[str]:
    """Bring all runs of one tree into another: new ones as a whole, of the others the samples that are missing.

    Returns:
        A line per run: what was done.

    Raises:
        RecordError: records can't be read, or a run of the same name is another run, or contradicts. Nothing of that run is
            changed; those before it are merged.
    """
    told = []
    for folder in runs(source):
        name = folder.relative_to(source)
        there = target / name
        if not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            scratch = there.with_name(f".{there.name}.{uuid.uuid4().hex}")
            shutil.copytree(folder, scratch, ignore=shutil.ignore_patterns(".*"))
            scratch.rename(there)
            told.append(f"{name}: copied")
            continue
        told.append(f"{name}: {_merge_run(folder, there)}")
    return told


def _merge_run(folder: Path, there: Path) -> str:
    new = {row["key"]: row for row in read_file(folder / "samples.jsonl")}
    config = (there / "config.yaml").read_text(encoding="utf-8")
    with RunFolder(there, read_identity(folder), config) as run:
        known = run.samples()
        for key in new.keys() & known.keys():
            if not _alike(new[key], known[key]):
                raise RecordError(f"{there} and {folder} have two outcomes for {key}: look which of them is right")
        missing = [row for key, row in new.items() if key not in known]
        if not missing:
            return "nothing new"
        run.append(missing)
        # it does not count the new samples
        (there / "summary.jsonl").unlink(missing_ok=True)
        return f"{len(missing)} samples added; run its command again for the summary"


def _alike(one: Row, other: Row) -> bool:
    """Whether two records of one key say the same; the shape of a batch moves the last digits of fidelity."""
    names = (one.keys() | other.keys()) - set(_FREE)
    return all(name in one and name in other and _close(one[name], other[name]) for name in names)


def _close(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-2, abs_tol=1e-3)
    return one == other
