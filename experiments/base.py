"""What every experiment does: run what is missing, read the records, print its table beside the paper's numbers.

An experiment is a YAML in conf/experiment (panel, task, limits) and a small module here (what to print of it). Overrides of the
command line go to both: `python -m experiments.table1 model=llama2-7b task.limit=500`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mikv.cli import explained, quiet
from mikv.metrics.paired import Paired, holm, paired
from mikv.metrics.summary import clusters_of
from mikv.results import Results, panel_of, read_results

Row = dict[str, Any]

ADJUSTED = "p: McNemar's exact test, adjusted for the number of tests in the table (Holm)"


def finish(experiment: str, *overrides: str) -> Path:
    """Run what is missing of an experiment; the folder of its records."""
    from mikv.config import compose
    from mikv.runner import execute

    composed = compose(f"experiment={experiment}", *overrides)
    execute(composed)
    return composed.folder()


def folders(panel: str, experiment: str, tasks: Sequence[str], arguments: Sequence[str] | None) -> tuple[list[Path], Path]:
    """Of an experiment that shows several runs of a panel together: the runs' folders, and where figures go.

    tasks: overrides of each task that it is made of, for --run.
    """
    parser = ArgumentParser(
        prog=f"python -m experiments.{experiment}",
        description=sys.modules["__main__"].__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, help=f"folders of runs; none = every run of panel={panel} under --records"
    )
    parser.add_argument("--records", type=Path, default=Path("results/runs"), help="folder of all runs")
    parser.add_argument("--out", type=Path, default=Path("results/figures"), help="where figures and tables go")
    parser.add_argument(
        "--run", nargs="+", metavar="OVERRIDE", help=f"run {', '.join(tasks)} with these overrides, and show them"
    )
    options = parser.parse_args(arguments)
    if options.run:
        quiet()
        with explained():
            found = [finish(experiment, *task.split(), *options.run) for task in tasks]
    else:
        found = options.runs or runs_of(options.records, panel)
    if not found:
        print(
            f"error: no run of panel={panel} is under {options.records}: python run.py panel={panel} {tasks[0]}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    options.out.mkdir(parents=True, exist_ok=True)
    return found, options.out


def runs_of(out: Path, panel: str) -> list[Path]:
    """Folders under `out` that hold finished runs of a panel."""
    return [summary.parent for summary in sorted(out.glob("*/summary.jsonl")) if panel_of(summary.parent) == panel]


def run(experiment: str, *overrides: str) -> Results:
    """Run what is missing of an experiment, and read what there is then."""
    return read_results(finish(experiment, *overrides))


def paper_table(title: str, rows: Sequence[Row], paper: Mapping[str, float]) -> Any:
    """Our numbers beside the paper's, a row per policy.

    Args:
        title: of the table.
        rows: summary rows, `full` first.
        paper: the paper's accuracy in per cent by policy label, where it is known.
    """
    from rich.table import Table

    table = Table(
        title=f"{title}\n{rows[0]['model']} · {rows[0]['task']} · n = {rows[0]['n']}",
        caption=f"95 % intervals; vs full: paired, in points; {ADJUSTED}; size: bytes counted from stored tensors, formula: "
        "the paper's, without positions and scores. Paper: Llama-2-7B, unknown numbers of lines and samples",
    )
    table.add_column("policy", no_wrap=True)
    for name in (rows[0]["metric"] + " %", "vs full", "p", "size %", "formula %", "paper %"):
        table.add_column(name, justify="right", no_wrap=True)
    tests = adjusted({row["label"]: row["mcnemar_p"] for row in rows if row["policy"] != "full"})
    for row in rows:
        known = paper.get(row["label"])
        table.add_row(
            row["label"],
            percent(row["value"], row["ci95"]),
            "" if row["policy"] == "full" else points(row["difference"], row["difference_ci95"]),
            f"{tests[row['label']]:.2g}" if row["label"] in tests else "",
            f"{row['size_percent']:.1f}",
            "" if row["size_percent_paper"] is None else f"{row['size_percent_paper']:.1f}",
            "" if known is None else f"{known:g}",
        )
    return table


def adjusted(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Holm's adjusted p-values of those comparisons that have a test: they stand in one table, and one is soon below 0.05."""
    known = {label: p for label, p in p_values.items() if p is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def percent(value: float, bounds: Sequence[float] | None) -> str:
    """'92.6 [88.1, 95.5]'."""
    return f"{100 * value:.1f}" + (f" \\[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else "")


def points(value: float, bounds: Sequence[float] | None) -> str:
    """'-7.4 [-12.0, -3.0]'."""
    return f"{100 * value:+.1f}" + (f" \\[{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else "")


def compare(results: Results, label: str, reference: str) -> Paired | None:
    """A policy against another one of the panel, sample by sample; None where they have none in common."""
    mine, other = (
        {row["sample"]: row for row in results.samples if row["label"] == name and row["score"] is not None}
        for name in (label, reference)
    )
    both = [mine[sample] for sample in sorted(mine.keys() & other.keys())]
    return paired(
        [row["score"] for row in both],
        [other[row["sample"]]["score"] for row in both],
        outcomes=results.summary[0]["kind"] == "outcome",
        clusters=clusters_of(both),
    )


def show(*tables: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    for table in tables:
        console.print(table)


def arguments() -> list[str]:
    """Overrides on the command line of an experiment; --help prints what the experiment is, and ends it."""
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\nOptions are those of run.py: python run.py --help")
        raise SystemExit(0)
    return given


def main(experiment: str, title: str, paper: Mapping[str, float]) -> None:
    """The program of an experiment that is one run and one table."""
    quiet()
    with explained():
        show(paper_table(title, run(experiment, *arguments()).summary, paper))
