"""Three risks at equal bytes: one table and one figure from the records of panel=risk.

    python run.py panel=risk model=smollm2-recall task=safety
    python -m experiments.risks                       every run of panel=risk under results/runs
    python -m experiments.risks RUN_FOLDER ...        these runs
    python -m experiments.risks --run model=smollm2-135m task.data_dir=FOLDER     run what is missing of all three suites first

A risk is a rate (of breaches, inventions, wrong answers, ...) of one task or part of a suite. The table compares policies of
equal size in its columns: rate with n and 95 % interval, paired change from the full cache with its own and McNemar's exact
test. The figure has a panel per risk, a line per policy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from experiments.base import folders
from mikv.cli import explained
from mikv.plots import risk_grid
from mikv.results import read_results

Row = dict[str, Any]

SUITES = ("safety", "hallucination", "contextloss")

BUDGETS = (20, 30, 50)
"""Per cent of the 16-bit cache's bytes, as in conf/panel/risk.yaml."""


def budget(size_percent: float) -> int | None:
    """The budget that a cache of this size fits and uses: at least four fifths of it, and at most 8 % more (bits come in
    steps: uniform quantization has no size between)."""
    return next((b for b in BUDGETS if 0.8 * b <= size_percent <= 1.08 * b), None)


def risks(summary: Sequence[Row]) -> Iterator[Row]:
    """A row per risk and policy, of a suite's parts or of a task's own flags."""
    for row in summary:
        parts = row.get("parts") or {row["task"]: row}
        named = row.get("risks") or {row["task"]: list(row["rates"])}
        for part, names in named.items():
            for name in names:
                if name in parts[part]["rates"]:
                    yield _flat(row, part, name, parts[part]["rates"][name])


def _flat(row: Row, part: str, name: str, rate: Row) -> Row:
    low, high = rate["ci95"] or (None, None)
    lower, upper = rate.get("difference_ci95") or (None, None)
    is_full = row["policy"] == "full"
    return {
        "model": row["model"],
        "task": row["task"],
        "question": row["question"],
        "risk": part if name == "wrong" else f"{part} {name}",
        "budget": None if is_full else budget(row["size_percent"]),
        "policy": row["policy"],
        "label": row["label"],
        "size": row["size_percent"],
        "rate": rate["value"],
        "low": low,
        "high": high,
        "n": rate["n"],
        "change": None if is_full else rate.get("difference"),
        "change_low": None if is_full else lower,
        "change_high": None if is_full else upper,
        "p": None if is_full else rate.get("mcnemar_p"),
    }


def table(rows: Sequence[Row]) -> Any:
    """A row per risk and policy, a column per budget: what stands in a column has the same size."""
    from rich.table import Table

    shown = Table(
        title=f"{rows[0]['model']}: risks at equal bytes, question {rows[0]['question']}",
        caption="rate \\[95 % interval], change from the full cache in points \\[95 % interval of the paired difference], "
        "* = McNemar's exact p below 0.05, each test by itself: of many, some are without reason; sizes are counted from "
        "stored tensors",
    )
    for name in ("risk", "policy"):
        shown.add_column(name, no_wrap=True)
    for b in BUDGETS:
        shown.add_column(f"{b} % of the bytes", no_wrap=True)
    for risk in dict.fromkeys(row["risk"] for row in rows):
        mine = [row for row in rows if row["risk"] == risk]
        full = next(row for row in mine if row["policy"] == "full")
        shown.add_row(f"{risk} (n = {full['n']})", "full", _rate(full))
        others = [row for row in mine if row["budget"] is not None]
        for name in dict.fromkeys(row["policy"] for row in others):
            cells = ("\n".join(_cell(r) for r in others if (r["policy"], r["budget"]) == (name, b)) for b in BUDGETS)
            shown.add_row("", name, *cells)
        shown.add_section()
    return shown


def _rate(row: Row) -> str:
    return f"{row['rate']:.2f}" + ("" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]")


def _cell(row: Row) -> str:
    """'8/3: 0.25 [0.15, 0.40] +12 [+2, +24] *'."""
    kind = row["label"].split("%")[-1].removeprefix(row["policy"]).split("low_group")[0].replace("balanced", "").strip()
    change = f"{100 * row['change']:+.0f}"
    if row["change_low"] is not None:
        change += f" [{100 * row['change_low']:+.0f}, {100 * row['change_high']:+.0f}]"
    star = " *" if row["p"] is not None and row["p"] < 0.05 else ""
    return (f"{kind}: " if kind else "") + f"{_rate(row)} {change}{star}"


def main(arguments: Sequence[str] | None = None) -> None:
    import matplotlib
    from rich.console import Console

    matplotlib.use("Agg")
    runs, out = folders("risk", "risks", [f"task={suite}" for suite in SUITES], arguments)
    with explained():
        rows = [row for folder in runs for row in risks(read_results(folder).summary)]
    if not rows:
        print("error: these runs measured no risk", file=sys.stderr)
        raise SystemExit(2)
    console = Console()
    if not console.is_terminal:
        console = Console(width=190)
    for model, question in dict.fromkeys((row["model"], row["question"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["question"]) == (model, question)]
        console.print(table(mine))
        name = out / (f"risks-{model}" + ("" if question == "visible" else f"-{question}"))
        pd.DataFrame(mine).to_csv(name.with_suffix(".csv"), index=False)
        risk_grid(mine, f"{model}, question {question}").savefig(name.with_suffix(".png"), dpi=150)
        print(f"table    {name}.csv (all rows and columns)\nfigure   {name}.png")


if __name__ == "__main__":
    main()
