"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# Columns of a table of risks: more would be folded.
_RISKS = 6


def print_table(rows: Sequence[Row]) -> None:
    """Summary rows as a table in the terminal; of a suite also each part's risks."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a log file has no width: rather a long line than cut names
        console = Console(width=160)
    console.print(_main_table(rows))
    first = rows[0]
    if "system_tiers" in first:
        console.print(_system_table(rows))
    if "parts" in first:
        risks = [
            (part, name) for part, names in first["risks"].items() for name in names if name in first["parts"][part]["rates"]
        ]
        for start in range(0, len(risks), _RISKS):
            console.print(_risk_table(rows, risks[start : start + _RISKS]))
        print("intervals, p-values and counts of each rate: summary.jsonl, and python -m experiments.risks")


def _main_table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    first = rows[0]
    suite = "parts" in first
    table = Table(
        title=f"{first['model']} · {first['task']} · n = {first['n']} · question {first['question']}",
        caption="size: stored bytes of the 16-bit cache's, counted from tensors; paper: by the paper's formula; "
        "± standard error; lost / gained: samples that got worse / better than with full; "
        "kl, agree: on the full cache's own answers, in nats per token, share of equal top-1 tokens",
    )
    table.add_column("policy", no_wrap=True)
    others = [] if suite else [name for name in first["scores"] if name != first["metric"]]
    flags = [] if suite else list(first["rates"])
    paired = "difference" in first
    columns = [*others, "size %", "paper %", *(["vs full", "lost", "gained"] if paired else [])]
    columns += [*(["kl", "agree"] if "kl" in first and first["metric"] != "kl" else ["agree"] if "kl" in first else []), *flags]
    table.add_column(first["metric"].replace("_", " "), justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        twin = row["policy"] == "full"
        cells = {
            **{name: _number(row["scores"][name]) for name in others},
            "size %": f"{row['size_percent']:.1f}",
            "paper %": f"{row['size_percent_paper']:.1f}",
            "vs full": "" if twin or not paired else f"{row['difference']:+.2f}",
            "lost": "" if twin or not paired else str(row["lost"]),
            "gained": "" if twin or not paired else str(row["gained"]),
            "kl": "" if twin or "kl" not in row else f"{row['kl']:.2g}",
            "agree": "" if twin or "kl" not in row else f"{row['agreement']:.3f}",
            **{flag: f"{row['rates'][flag]['value']:.2f}" for flag in flags},
        }
        table.add_row(row["label"], _with_error(row["value"], row["stderr"]), *(cells[column] for column in columns))
    return table


def _risk_table(rows: Sequence[Row], risks: Sequence[tuple[str, str]]) -> Any:
    """A column per (part, risk): its rate, and the change from the full cache."""
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"risks of {first['task']}: rate, and change from full in points")
    table.add_column("policy", no_wrap=True)
    for part, risk in risks:
        name = part if risk == "wrong" else f"{part}\n{risk}"
        table.add_column(f"{name}\nn = {first['parts'][part]['rates'][risk]['n']}".replace("_", " "), justify="right")
    for row in rows:
        rates = [row["parts"][part]["rates"][risk] for part, risk in risks]
        twin = row["policy"] == "full"
        table.add_row(row["label"], *(f"{r['value']:.2f}" + ("" if twin else f" {100 * r['difference']:+.0f}") for r in rates))
    return table


def _system_table(rows: Sequence[Row]) -> Any:
    """What became of the system prompt: a column for each kind of tier."""
    from rich.table import Table

    table = Table(title="system prompt: % of its tokens by the bits that hold them when the answer begins")
    table.add_column("policy", no_wrap=True)
    kinds = sorted({bits for row in rows for bits in row["system_tiers"]}, key=lambda bits: (bits == "0", -_bits(bits), bits))
    for bits in kinds:
        table.add_column("evicted" if bits == "0" else bits, justify="right")
    for row in rows:
        tiers = row["system_tiers"]
        table.add_row(row["label"], *(f"{100 * tiers[bits]:.0f}" if bits in tiers else "" for bits in kinds))
    return table


def _bits(name: str) -> int:
    """The key bits of a tier's name: '16', 'k8v4'."""
    return int(name.removeprefix("k").split("v")[0])


def _with_error(value: float, error: float | None) -> str:
    return _number(value) if error is None else f"{_number(value)} ± {_number(error)}"


def _number(value: float) -> str:
    """Three decimals; of what is smaller, two digits; of what is larger, four."""
    if value and abs(value) < 0.00995:  # what is not 0.010 with three
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
