"""A tree of runs: what is in it, are its records whole, and how do two trees become one."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikv.fingerprint import record_key
from mikv.metrics.recount import alike, summary_differences
from mikv.records.files import RecordError, Row, read_rows
from mikv.records.folder import RunFolder, read_about, read_environments, read_identity, read_samples

_CIRCUMSTANCES = ("environment", "batch", "reader", "attention")
"""Fields of a sample that say how it was computed: where they differ, numbers round otherwise, a code at a tie may flip, and
now and then an answer."""
_FIXED = (
    *("policy", "policy_id", "label", "model", "task", "question", "sample", "subtask", "doc_id", "asked", "target"),
    *("prompt_tokens", "cut_tokens", "lines", "depth", "cluster"),
)
"""Fields that are known before anything is computed: no circumstances move them."""
_MOVED = {"relative": 1e-2, "absolute": 1e-3}
"""How far the shape of a batch moves a number."""
_FREE = (*_CIRCUMSTANCES, "seconds", "allocated_nbytes", "peak_nbytes", "worst_layer", "layer_distance")
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
    """What is wrong with the records of a run: lines, keys, doubles, and a summary that does not say what its samples do."""
    problems: list[Problem] = []

    def found(what: str, grave: bool = True) -> None:
        problems.append(Problem(folder, what, grave))

    samples: list[Row] = []
    try:
        identity = read_identity(folder)
        environments = read_environments(folder)
        if (folder / "samples.jsonl").exists():
            samples = list(read_rows(folder / "samples.jsonl", torn=lambda message: found(message, grave=False)))
        summary = read_file(folder / "summary.jsonl")
    except RecordError as error:
        found(str(error))
        return problems
    by_key: dict[str, Row] = {}
    for row in samples:
        before = by_key.setdefault(row["key"], row)
        if before is not row:
            kind = _compare(before, row, environments, environments)
            found(f"{row['key']} is there twice, {kind}", grave=kind == _CONTRADICTION)
    rows = list(by_key.values())
    about = read_about(folder)
    if kept := about.get("kept"):
        for name in _edited(folder, about.get("sha256", {})):
            found(f"{name} is not as it was kept: edited, or of another time than run.json")
        for what in _kept_problems(kept, summary, rows) if summary else ["there is no summary"]:
            found(what)
        return problems
    if foreign := [row for row in rows if not _belongs(row, identity)]:
        found(
            f"{len(foreign)} samples are not of this run: {foreign[0]['key']} is not the key of what run.json and the row say"
        )
    if contradicting := [row for row in rows if "correct" in row and float(bool(row["correct"])) != row.get("score")]:
        found(f"{len(contradicting)} samples say one thing as correct and another as score: {contradicting[0]['key']}")
    if unknown := {str(row.get("environment")) for row in rows} - environments.keys():
        found(f"rows name environments that are not noted: {', '.join(sorted(unknown))}")
    if summary:
        for what in _recounted(summary, rows):
            found(what, grave=not _replaced(rows))
    else:
        found(f"unfinished: {len(rows)} samples and no summary", grave=False)
    return problems


def _replaced(rows: Sequence[Row]) -> bool:
    """Whether the task's data have changed since some of the rows: those of samples that were not asked for again may be in no
    summary."""
    return len({(row.get("policy_id"), row.get("sample")) for row in rows}) < len(rows)


def _recounted(summary: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """See `summary_differences`. Of a sample whose content has changed the last record counts."""
    try:
        last = {(row["policy_id"], row["sample"]): row for row in rows}
        return summary_differences(summary, list(last.values()))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return [f"a line of the summary or of the samples lacks something or was edited ({type(error).__name__}: {error})"]


def _edited(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Files of a kept result set that don't have the content that was kept, or are gone."""
    there = {name: folder / name for name in digests if (folder / name).is_file()}
    found = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in there.items()}
    return [name for name, digest in digests.items() if found.get(name) != digest]


def _kept_problems(kept: str, summary: Sequence[Row], samples: Sequence[Row]) -> Iterator[str]:
    """Of a kept result set (scripts/keep_results.py): its summary, and of its samples the flipped ones with the full cache's,
    or none. So many must be there as the summary counts."""
    full = summary[0]["label"]
    before = {row["sample"]: row for row in samples if row["label"] == full}
    for row in summary[1:]:
        mine = [one for one in samples if one["label"] == row["label"]]
        changes = [one["score"] - before[one["sample"]]["score"] for one in mine if one["sample"] in before]
        lower, higher = sum(c < 0 for c in changes), sum(c > 0 for c in changes)
        lost, gained = (higher, lower) if row.get("lower_is_better") else (lower, higher)
        wanted = (row["lost"], row["gained"]) if kept == "flips" and row.get("lost") is not None else (0, 0)
        if (lost, gained) != wanted or len(changes) != len(mine):
            yield (
                f"the summary counts {wanted[0]} lost and {wanted[1]} gained samples of {row['label']}, and {lost} and "
                f"{gained} are there"
            )


def _belongs(row: Row, identity: Any) -> bool:
    """Whether a row's key is that of what it says, in this run."""
    if not {"policy_id", "doc_id"} <= row.keys() or row["key"] != record_key(identity, row["policy_id"], row):
        return False
    told = {"model": identity["model"]["name"], "task": identity["task"]["name"], "question": identity["protocol"]["question"]}
    return all(row.get(name) == value for name, value in told.items())


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
    new = read_samples(folder)
    config = (there / "config.yaml").read_text(encoding="utf-8")
    with RunFolder(there, read_identity(folder), config) as run:
        known = run.samples()
        theirs, ours = read_environments(folder), read_environments(there)
        rounded = 0
        for key in new.keys() & known.keys():
            kind = _compare(known[key], new[key], ours, theirs)
            if kind == _CONTRADICTION:
                raise RecordError(f"{there} and {folder} have {kind} for {key}: look which of them is right")
            rounded += kind == _ROUNDED
        told = (
            [f"{rounded} were computed otherwise (batch, machine or code) and differ: the ones there stay"] if rounded else []
        )
        missing = [row for key, row in new.items() if key not in known]
        if not missing:
            return "; ".join(["nothing new", *told])
        run.add_environments({name: theirs[name] for name in {row["environment"] for row in missing} if name in theirs})
        run.append(missing)
        # it does not count the new samples
        (there / "summary.jsonl").unlink(missing_ok=True)
        return "; ".join([f"{len(missing)} samples added, run its command again for the summary", *told])


_ALIKE, _ROUNDED, _CONTRADICTION = "alike", "computed under other circumstances, and not alike", "two outcomes"


def _compare(one: Row, other: Row, its: Mapping[str, Row], others: Mapping[str, Row]) -> str:
    """Do two records of one key say the same? Where they don't, and were computed in the same way, one of them is wrong.

    its, others: environments of the folders that they are from.
    """
    names = (one.keys() | other.keys()) - set(_FREE)
    if all(name in one and name in other and alike(one[name], other[name], **_MOVED) for name in names):
        return _ALIKE
    if any(one.get(name) != other.get(name) for name in _FIXED):
        return _CONTRADICTION
    same_shape = all(one.get(name) == other.get(name) for name in _CIRCUMSTANCES if name != "environment")
    same_place = _place(one, its) == _place(other, others)
    return _CONTRADICTION if same_shape and same_place else _ROUNDED


def _place(row: Row, environments: Mapping[str, Row]) -> Row:
    """A row's environment, without when it began."""
    return {name: value for name, value in environments.get(str(row.get("environment")), {}).items() if name != "began"}
