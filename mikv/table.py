"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def print_table(rows: Sequence[Row], flags: Sequence[str]) -> None:
    """Summary rows as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first['model']} · {first['task']} · n = {first['n']} · question {first['question']}",
        caption="size: stored bytes of the 16-bit cache's, counted from tensors; paper: by the paper's formula; "
        "± standard error; lost / gained: answers that full had right / wrong",
    )
    table.add_column("policy", no_wrap=True)
    for column in (first["metric"], "size %", "paper %", "vs full", "lost", "gained", *flags):
        table.add_column(column.replace("_", " "), justify="right", no_wrap=column == first["metric"])
    for row in rows:
        twin = row["policy"] == "full"
        table.add_row(
            row["label"],
            _with_error(row["value"], row["stderr"]),
            f"{row['size_percent']:.1f}",
            f"{row['size_percent_paper']:.1f}",
            "" if twin else f"{row['difference']:+.2f}",
            "" if twin else str(row["lost"]),
            "" if twin else str(row["gained"]),
            *(f"{row['rates'][flag]:.2f}" for flag in flags),
        )
    console = Console()
    if not console.is_terminal:  # a log file has no width: rather a long line than cut names
        console = Console(width=130)
    console.print(table)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
