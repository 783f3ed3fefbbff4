"""Accuracy and divergence against bytes over several tasks: a run of panel=paper for each, one figure for each measure.

python -m experiments.pareto model=smollm2-recall
python -m experiments.pareto model=llama2-7b "tasks=linerecall task.lines=40,mmlu task.subset=tiny,gsm8k,fidelity"

`tasks` lists them, with a comma between two; overrides behind a task's name are its own, all others go to every task (name=x
as name=x-linerecall, ...). Which policies are on the Pareto front (no other one is as good with fewer bytes) is printed, and
drawn as a dashed line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.base import arguments, run, show
from mikv.cli import explained, quiet
from mikv.metrics.pareto import pareto_front
from mikv.results import measures

Row = dict[str, Any]

TASKS = "linerecall,guardedrecall,fidelity"
FIGURES = "results/figures"


def points(summary: Sequence[Row]) -> list[Row]:
    """A row per policy and measure: the task's metric as `score`, and `kl` where it was measured."""
    rows = []
    for row in summary:
        found = measures(row)
        for kind, name in (("score", row["metric"]), ("kl", "kl")):
            if name in found and (kind == "kl") == (name == "kl"):
                kept = {key: row[key] for key in ("model", "task", "policy", "label", "size_percent")}
                rows.append({**kept, "kind": kind, "measure": name, **found[name]})
    return rows


def front_table(rows: Sequence[Row]) -> Any:
    """The policies that no other one beats, for each task and measure, from the smallest cache on."""
    from rich.table import Table

    table = Table(title=f"{rows[0]['model']}: policies on the front (no other one is as good with fewer bytes)")
    for name in ("task", "measure", "policy"):
        table.add_column(name, no_wrap=True)
    for name in ("value [95 %]", "size %"):
        table.add_column(name.replace("[", "\\["), justify="right", no_wrap=True)
    for task, measure in dict.fromkeys((row["task"], row["measure"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["measure"]) == (task, measure)]
        front = pareto_front([r["size_percent"] for r in mine], [r["value"] for r in mine], mine[0]["lower_is_better"])
        for i, place in enumerate(front):
            row = mine[place]
            bounds = f" \\[{row['ci95'][0]:.3g}, {row['ci95'][1]:.3g}]" if row["ci95"] else ""
            first = (task, measure) if i == 0 else ("", "")
            table.add_row(*first, row["label"], f"{row['value']:.3g}{bounds}", f"{row['size_percent']:.1f}")
        table.add_section()
    return table


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A figure for each kind of measure."""
    import matplotlib

    matplotlib.use("Agg")
    from mikv.plots import curve_grid

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind, title in (
        ("score", "Score against counted bytes"),
        ("kl", "Divergence from the full cache against counted bytes"),
    ):
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            files.append(folder / f"pareto-{rows[0]['model']}-{kind}.png")
            curve_grid(mine, title).savefig(files[-1], dpi=150)
    return files


def main(arguments: Sequence[str]) -> None:
    mine = ("tasks=", "figures=", "name=")
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith(mine))
    common = [argument for argument in arguments if not argument.startswith(mine)]
    rows: list[Row] = []
    for entry in given.get("tasks", TASKS).split(","):
        task, *own = entry.split()
        folder = [f"name={given['name']}-{task}"] if "name" in given else []
        rows += points(run("pareto", f"task={task}", *common, *own, *folder).summary)
    show(front_table(rows))
    for file in draw(rows, Path(given.get("figures", FIGURES))):
        print(f"figure   {file}")


if __name__ == "__main__":
    quiet()
    with explained():
        main(arguments())
