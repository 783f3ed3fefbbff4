"""Does this working tree give what another commit gave? Runs both on the same prompts and prints every difference.

    python scripts/compare_commits.py COMMIT                 the panels and prompts of the reference runs, a few each
    python scripts/compare_commits.py COMMIT --limit 100     as many as there
    python scripts/compare_commits.py COMMIT --tiny          the tiny random model: seconds instead of minutes
    python scripts/compare_commits.py COMMIT --speed 2       scripts/bench_curve.py of both, in turns, twice

Each side runs in a process of its own, from its own code (the commit's from a worktree that goes away again), on the same
machine and number of threads. Compared are all fields of all rows (answers, log-probabilities, tiers, bytes by part, kept
tokens) but what is no outcome: keys, environments, times and the memory that is set aside. Exit status 1 = something differs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# name: overrides of run.py, and how many samples of the reference run are taken
SHORT = ("task.max_new_tokens=24",)
RUNS: dict[str, tuple[tuple[str, ...], int]] = {
    "demo": (("panel=demo", "task=linerecall", "model=smollm2-recall", *SHORT), 8),
    "ablations": (("panel=ablations", "task=linerecall", "model=smollm2-recall", *SHORT), 4),
    "risk": (("panel=risk", "task=guardedrecall", "model=smollm2-recall"), 4),
    "fidelity": (("panel=paper", "task=fidelity", "model=smollm2-135m"), 1),
    "packed": (("panel=demo", "task=linerecall", "model=smollm2-recall", "reader=packed", *SHORT), 2),
    "kernel": (("panel=demo", "task=linerecall", "model=smollm2-recall", "reader=kernel", *SHORT), 2),
}
TINY: dict[str, tuple[tuple[str, ...], int]] = {
    reader: (
        ("panel=demo", "task=linerecall", "task.lines=6", "model=tiny-random", f"reader={reader}", "task.max_new_tokens=12"),
        3,
    )
    for reader in ("working", "kernel")
}
# Fields that say who ran it and how fast, or name something that is derived from the code.
NO_OUTCOME = {"key", "environment", "policy_id", "seconds", "peak_nbytes", "allocated_nbytes", "worst_layer", "layer_distance"}

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with: any name that git knows")
    parser.add_argument("--limit", type=int, help="samples of each run; default: a few")
    parser.add_argument("--tiny", action="store_true", help="the tiny random model only")
    parser.add_argument("--speed", type=int, metavar="TURNS", help="compare times instead of outcomes")
    parser.add_argument("--only", nargs="*", help="some of the runs", choices=[*RUNS, *TINY])
    chosen = parser.parse_args(arguments)
    runs = {name: run for name, run in (TINY if chosen.tiny else RUNS).items() if not chosen.only or name in chosen.only}
    unlike = 0
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "worktree"
        _git("worktree", "add", "--detach", str(other), chosen.commit)
        try:
            if chosen.speed:
                return _compare_times(other, chosen.speed)
            for name, (overrides, few) in runs.items():
                limit = f"task.limit={chosen.limit or few}"
                sides = [
                    _rows(code, Path(folder) / f"{side}-{name}", (*overrides, limit))
                    for side, code in (("theirs", other), ("ours", ROOT))
                ]
                found = list(differences(*sides))
                unlike += len(found)
                print(f"{name}: {len(sides[1])} rows, {len(found)} differences", flush=True)
                for line in found[:20]:
                    print(f"  {line}")
                if len(found) > 20:
                    print(f"  ... and {len(found) - 20} more")
        finally:
            _git("worktree", "remove", "--force", str(other))
    print("nothing differs" if not unlike else f"{unlike} differences")
    return int(unlike > 0)


def _compare_times(other: Path, turns: int) -> int:
    """Medians of what bench_curve.py prints, by line, and theirs over ours."""
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(turns):
        for side, code in (("theirs", other), ("ours", ROOT)):
            command = [sys.executable, "scripts/bench_curve.py", "--samples", "4"]
            printed = subprocess.run(command, cwd=code, capture_output=True, text=True, check=True).stdout
            for line in printed.splitlines():
                if found := re.match(r"(\D.*?)  +([\d.]+) s\b", line):
                    name = re.sub(r"\d+", "N", found[1])
                    times.setdefault(name, {"theirs": [], "ours": []})[side].append(float(found[2]))
    for name, of in times.items():
        theirs, ours = (statistics.median(of[side]) for side in ("theirs", "ours"))
        print(f"{name:45s} {theirs:7.2f} s -> {ours:7.2f} s   {theirs / ours:.2f}x as fast")
    return 0


def differences(theirs: Sequence[Row], ours: Sequence[Row]) -> Iterator[str]:
    """What differs between the rows of two runs, as text."""
    before, now = ({_name(row): row for row in rows} for rows in (theirs, ours))
    for name in before.keys() ^ now.keys():
        yield f"{name}: only in {'theirs' if name in before else 'ours'}"
    for name in before.keys() & now.keys():
        mine, other = now[name], before[name]
        for field in sorted((mine.keys() | other.keys()) - NO_OUTCOME):
            if mine.get(field) != other.get(field):
                yield f"{name}: {field}: {json.dumps(other.get(field))[:120]} -> {json.dumps(mine.get(field))[:120]}"


def _name(row: Row) -> str:
    return " · ".join(str(row[field]) for field in ("label", "subtask", "sample") if row.get(field) is not None)


def _rows(code: Path, out: Path, overrides: Sequence[str]) -> list[Row]:
    command = [sys.executable, "run.py", *overrides, "name=compared", f"out={out}", "tracker=none"]
    ran = subprocess.run(command, cwd=code, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} in {code}:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    lines = [
        line for file in sorted((out / "compared").glob("samples*.jsonl")) for line in file.read_text("utf-8").splitlines()
    ]
    return [json.loads(line) for line in lines]


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True)


if __name__ == "__main__":
    raise SystemExit(main())
