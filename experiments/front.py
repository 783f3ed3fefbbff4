"""Our own policy against its rivals: one table and one figure from the records of panel=front.

    python run.py panel=front model=smollm2-135m task=fidelity task.text=code
    python -m experiments.front                       every run of panel=front under results/runs
    python -m experiments.front RUN_FOLDER ...        these runs
    python -m experiments.front --run model=smollm2-135m       run what is missing of both texts first

The table says of each of our own points how many times as much the best rival of as many bytes, or up to a quarter more, loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.base import folders, show
from mikv.cli import explained
from mikv.fingerprint import content_fingerprint
from mikv.plots import curve_grid
from mikv.results import frame
from mikv.work.fidelity import TEXTS

Row = dict[str, Any]

OURS = "whiten"
TASKS = ("task=fidelity task.text=prose", "task=fidelity task.text=code")
SIZES = (12.0, 36.0)
"""What the figure shows, in per cent of the 16-bit cache."""
MORE = 1.25
"""Times as many bytes a rival may have."""


def points(runs: Sequence[Path]) -> list[Row]:
    """A row per run and policy: of the task's own metric. Texts are called by their names."""
    rows: list[Row] = [{str(name): value for name, value in row.items()} for row in frame(runs).to_dict("records")]
    rows = [row for row in rows if row["first"]]
    for name, file in TEXTS.items():
        for row in rows:
            row["task"] = row["task"].replace(f"text={content_fingerprint(file)}", name)
    return rows


def rival(row: Row, rows: Sequence[Row]) -> Row | None:
    """The best policy of another make with as many bytes, or up to a quarter more; None where there is none."""
    others = [r for r in rows if r["policy"] not in (OURS, "full")]
    able = [r for r in others if 1 <= r["size_percent"] / row["size_percent"] <= MORE]
    return min(able, key=lambda r: r["value"] if r["lower_is_better"] else -r["value"], default=None)


def table(rows: Sequence[Row]) -> Any:
    """The points of one run, from the smallest on."""
    from rich.table import Table

    first = rows[0]
    shown = Table(
        title=f"{first['model']} · {first['task']} · n = {first['n']}",
        caption=f"{first['measure']} with 95 % interval; size: bytes counted from tensors; best rival: of as many bytes, "
        "or up to a quarter more, and how many times as much it loses (divergence, or accuracy below the full cache's)",
    )
    shown.add_column("policy", no_wrap=True)
    for name in ("size %", first["measure"], "best rival"):
        shown.add_column(name, justify="right", no_wrap=True)
    full = next(row for row in rows if row["policy"] == "full")
    for row in sorted(rows, key=lambda row: row["size_percent"]):
        bounds = row["ci95"]
        value = f"{row['value']:.3g}" + (f" \\[{bounds[0]:.3g}, {bounds[1]:.3g}]" if isinstance(bounds, list) else "")
        other = rival(row, rows) if row["policy"] == OURS else None
        shown.add_row(row["label"], f"{row['size_percent']:.1f}", value, "" if other is None else _against(row, other, full))
    return shown


def _against(row: Row, other: Row, full: Row) -> str:
    """'uniform 3 balanced: 4.2 times'."""
    mine, theirs = (abs(r["value"] - full["value"]) for r in (row, other))
    return other["label"] + (f": {theirs / mine:{'.2g' if theirs < 10 * mine else '.0f'}} times" if mine else "")


def main(arguments: Sequence[str] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    with explained():
        runs, out = folders("front", "front", TASKS, arguments)
        rows = points(runs)
    groups = dict.fromkeys((row["model"], row["task"]) for row in rows)
    show(*(table([row for row in rows if (row["model"], row["task"]) == group]) for group in groups))
    file = out / "front.png"
    curve_grid(rows, "Our own policy and its rivals", columns=2, sizes=SIZES).savefig(file, dpi=150)
    print(f"figure   {file}")


if __name__ == "__main__":
    main()
