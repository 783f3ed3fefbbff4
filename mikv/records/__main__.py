"""Look at the records of a tree of runs, take them elsewhere, bring trees together, check them.

python -m mikv.records list results/runs --where model=llama2-7b
python -m mikv.records export results/runs all.parquet --where task=linerecall policy=mikv     (or .csv)
python -m mikv.records export results/runs samples.csv --samples
python -m mikv.records merge other/runs results/runs
python -m mikv.records check results/runs
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

from mikv.records.environment import summarized
from mikv.records.files import RecordError
from mikv.records.folder import read_environments
from mikv.records.tree import check, merge, read_file, rows_of, runs


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    try:
        return asked.do(asked)
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _list(asked: argparse.Namespace) -> int:
    wanted = list(rows_of(asked.tree, "summary.jsonl", dict(asked.where)))
    for run, rows in groupby(wanted, key=lambda row: row["run"]):
        for row in rows:
            bytes_, value = f"{row['size_percent']:.1f}", f"{row['value']:.4g}"
            print(f"{run:<60} {row['label']:<28} {row['metric']} {value:>8}  n {row['n']:>5}  size % {bytes_:>6}")
        print(f"{'':<60} {summarized(list(read_environments(asked.tree / run).values()))}")
    unfinished = [folder for folder in runs(asked.tree) if not (folder / "summary.jsonl").exists()]
    for folder in unfinished if not asked.where else ():
        print(f"{folder.relative_to(asked.tree)!s:<60} unfinished, {len(read_file(folder / 'samples.jsonl'))} samples")
    print(f"{len({row['run'] for row in wanted})} finished runs, {len(wanted)} rows; {len(unfinished)} unfinished in the tree")
    return 0


def _export(asked: argparse.Namespace) -> int:
    import pandas

    rows = list(rows_of(asked.tree, "samples.jsonl" if asked.samples else "summary.jsonl", dict(asked.where)))
    table = pandas.json_normalize(rows)  # nbytes.codes, seconds.prefill ...
    for name in table:
        if table[name].map(lambda value: isinstance(value, (list, dict))).any():
            table[name] = table[name].map(str)  # intervals, parts: neither format has columns for them
    if asked.file.suffix == ".csv":
        table.to_csv(asked.file, index=False)
    elif asked.file.suffix == ".parquet":
        table.to_parquet(asked.file, index=False)
    else:
        raise RecordError(f"{asked.file}: choose a name that ends in .csv or .parquet")
    print(f"{len(table)} rows, {len(table.columns)} columns -> {asked.file}")
    return 0


def _merge(asked: argparse.Namespace) -> int:
    print("\n".join(merge(asked.source, asked.tree)))
    return 0


def _check(asked: argparse.Namespace) -> int:
    found = [problem for folder in runs(asked.tree) for problem in check(folder)]
    for problem in found:
        print(f"{'WRONG' if problem.grave else 'note '} {problem.folder.relative_to(asked.tree)}: {problem.what}")
    grave = sum(problem.grave for problem in found)
    print(f"{len(runs(asked.tree))} runs, {grave} problems, {len(found) - grave} notes")
    return 1 if grave else 0


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no condition: field=value")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m mikv.records", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def command(name: str, do: object, what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what)
        sub.set_defaults(do=do)
        if name == "merge":
            sub.add_argument("source", type=Path, help="tree to take from; it is not changed")
        sub.add_argument("tree", type=Path, help="folder of runs, e.g. results/runs")
        return sub

    for name, do, what in (
        ("list", _list, "a line per run and policy, and what each run was made with"),
        ("export", _export, "a table as CSV or Parquet"),
    ):
        sub = command(name, do, what)
        if name == "export":
            sub.add_argument("file", type=Path, help="*.csv or *.parquet")
            sub.add_argument("--samples", action="store_true", help="a row per sample instead of per policy")
        sub.add_argument("--where", nargs="*", type=_condition, default=[], metavar="FIELD=VALUE")
    command("merge", _merge, "bring another tree's runs into this one")
    command("check", _check, "are all records whole? Status 1 if not")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
