"""The field in one figure: eviction and quantization at equal bytes, from the records of panel=field.

    python run.py panel=field task=linerecall protocol.question=hidden
    python -m experiments.field                       every run of panel=field under results/runs
    python -m experiments.field RUN_FOLDER ...        these runs
    python -m experiments.field --run model=smollm2-recall          run what is missing of both question protocols first

One table per run, from the fewest bytes on; one figure per task, a panel per model and question protocol. Marked is what no
policy of as many bytes or fewer beats. Each policy is compared, sample by sample, with its best neighbour: the best other
method within 6 % of its bytes, for the best one that is the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.base import ADJUSTED, adjusted, compare, folders, show
from experiments.front import Row, points
from mikv.cli import explained
from mikv.metrics.pareto import pareto_front
from mikv.plots import curve_grid
from mikv.results import Results, read_results

TASKS = ("task=linerecall", "task=linerecall protocol.question=hidden")
NEAR = 1.06
"""Times as many bytes, or as few, are equal."""


def neighbour(row: Row, rows: Sequence[Row]) -> Row | None:
    """The best row of another method with as many bytes, within NEAR; None where there is none."""
    near = [
        other
        for other in rows
        if other["policy"] not in (row["policy"], "full") and 1 / NEAR <= other["size_percent"] / row["size_percent"] <= NEAR
    ]
    return min(near, key=lambda r: r["value"] if r["lower_is_better"] else -r["value"], default=None)


def table(results: Results) -> Any:
    """A run's policies, from the fewest bytes on."""
    from rich.table import Table

    rows = sorted(results.summary, key=lambda row: row["size_percent"])
    first = rows[0]
    shown = Table(
        title=f"{first['model']} · {first['task']} · question {first['question']} · n = {first['n']}",
        caption=f"{first['metric']} with 95 % interval; size: bytes counted from tensors; *: no policy of as many bytes or "
        f"fewer is better; neighbour: the best other method within {NEAR - 1:.0%} of the bytes, change from it: paired; "
        + ADJUSTED,
    )
    shown.add_column("policy", no_wrap=True)
    for name in ("size %", first["metric"]):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("", "neighbour"):
        shown.add_column(name, no_wrap=True)
    for name in ("change", "p"):
        shown.add_column(name, justify="right", no_wrap=True)
    best = set(pareto_front([r["size_percent"] for r in rows], [r["value"] for r in rows], first["lower_is_better"]))
    near = {row["label"]: other for row in rows if row["policy"] != "full" and (other := neighbour(row, rows))}
    changes = {
        label: change for label, other in near.items() if (change := compare(results, label, other["label"])) is not None
    }
    tests = adjusted({label: change.p for label, change in changes.items()})
    for place, row in enumerate(rows):
        label = row["label"]
        change = changes.get(label)
        shown.add_row(
            label,
            f"{row['size_percent']:.1f}",
            _number(f"{row['value']:.3g}", row["ci95"], ".3g"),
            "*" if place in best else "",
            near[label]["label"] if label in near else "",
            "" if change is None else _number(f"{change.difference:+.2g}", change.ci95, "+.2g"),
            f"{tests[label]:.2g}" if label in tests else "",
        )
    return shown


def _number(value: str, bounds: Sequence[float] | None, form: str) -> str:
    return value if bounds is None else f"{value} \\[{bounds[0]:{form}}, {bounds[1]:{form}}]"


def main(arguments: Sequence[str] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    with explained():
        runs, out = folders("field", "field", TASKS, arguments)
        results = [read_results(folder) for folder in runs]
        rows = points(runs)
    show(*map(table, results))
    for task in dict.fromkeys(row["task"].split()[0] for row in rows):  # behind it stands in what its runs differ
        mine = [row for row in rows if row["task"].split()[0] == task]
        file = out / f"field-{task}.png"
        wide = min(2, len({(row["model"], row["task"]) for row in mine}))
        curve_grid(mine, "The field at equal bytes", columns=wide, sizes=(12, 55), bands=False).savefig(file, dpi=150)
        print(f"figure   {file}")


if __name__ == "__main__":
    main()
