"""The tables that a run ends with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mikv.columns import Column, aligned, bound_decimals, console, fitted, number, two_digits, with_intervals

Row = dict[str, Any]

_EXPLAINED = {
    "size %": "size: stored bytes of the 16-bit cache's, counted from tensors",
    "vs full": "vs full: difference from the full cache, paired",
    "kl": "kl: on the full cache's own answers, nats per token",
    "agree": "agree: share of equal top-1 tokens there",
    "lost": "lost / gained: samples that got worse / better than with full",
    "paper %": "paper: size by the paper's formula",
}


def print_table(rows: Sequence[Row]) -> None:
    """Summary rows as a table in the terminal; of a suite also each part's risks."""
    from rich.text import Text

    out, first = console(), rows[0]
    labels = {"policy": [row["label"] for row in rows]}
    samples = f" · n = {first['n']}" if len({row["n"] for row in rows}) == 1 else ""  # else a column says it
    title = f"{first['model']} · {first['task']}{samples} · question {first['question']}"
    table, shown, left_out = fitted(title, labels, _columns(rows), out.width)
    notes = ["[ ]: 95 % interval", *(text for name, text in _EXPLAINED.items() if name in shown)]
    if left_out:
        notes.append(f"no room here for {', '.join(left_out)}: see summary.jsonl, or widen the terminal")
    table.caption = Text("; ".join(notes))
    out.print(table)
    if "system_tiers" in first:
        _print_parts("system prompt: % of its tokens by the bits that hold them when the answer begins", labels, _tiers(rows))
    if "parts" in first:
        _print_parts(f"risks of {first['task']}: rate, and change from full in points", labels, _risks(rows))
        print("intervals, p-values and counts of each rate: summary.jsonl, and python -m experiments.risks")


def _columns(rows: Sequence[Row]) -> list[Column]:
    """All that there is to show of a run, the most important first: the metric, its price, the change from the full cache,
    fidelity, the flags of outcomes, the task's other scores, then what follows from these. What no row has is no column."""
    first, metric = rows[0], rows[0]["metric"]

    def besides_full(name: str) -> list[Any]:
        """Of the full cache nothing: it is what the others are compared with."""
        return [None if row["policy"] == "full" else row.get(name) for row in rows]

    columns = [value_column(metric, rows)]
    columns += [_plain("n", [row["n"] for row in rows], str)] if len({row["n"] for row in rows}) > 1 else []
    columns += [_plain("size %", [row["size_percent"] for row in rows], "{:.1f}".format)]
    if metric != "kl":  # a divergence is a difference from full itself
        columns += [_difference_column(rows), _plain("kl", besides_full("kl"), two_digits)]
    columns.append(_plain("agree", besides_full("agreement"), "{:.3f}".format))
    if "parts" not in first:  # a suite's have tables of their own
        for flag in first["rates"]:
            columns.append(_plain(flag, [row["rates"].get(flag, {}).get("value") for row in rows], "{:.2f}".format))
        for score in first["scores"]:
            if score != metric:
                columns.append(_plain(score, [row["scores"].get(score) for row in rows], number))
    if metric != "kl":
        columns += [_plain(name, besides_full(name), str) for name in ("lost", "gained")]
    columns.append(_plain("paper %", [row["size_percent_paper"] for row in rows], "{:.1f}".format))
    return [column for column in columns if any(map(str.strip, column.cells))]


def value_column(name: str, rows: Sequence[Row | None]) -> Column:
    """The metric with its interval. None: a row that has none."""
    texts = ["" if row is None else number(row["value"]) for row in rows]
    bounds = [None if row is None else row.get("ci95") for row in rows]
    return Column(name.replace("_", " "), with_intervals(texts, bounds), aligned(texts))


def _difference_column(rows: Sequence[Row]) -> Column:
    bounds = [None if row["policy"] == "full" else row.get("difference_ci95") for row in rows]
    texts = []
    for row, decimals in zip(rows, bound_decimals(bounds), strict=True):
        known = row["policy"] != "full" and "difference" in row
        texts.append(f"{round(row['difference'], decimals) + 0.0:+.{decimals}f}" if known else "")
    return Column("vs full", with_intervals(texts, bounds, sign="+"), aligned(texts))


def _plain(name: str, values: Sequence[Any], text: Callable[[Any], str]) -> Column:
    """A column of numbers without intervals, empty where there is None."""
    return Column(name.replace("_", " "), aligned(["" if value is None else text(value) for value in values]))


def _risks(rows: Sequence[Row]) -> list[Column]:
    """A column per part and risk: its rate, and the change from the full cache."""
    columns = []
    for part, risks in rows[0]["risks"].items():
        for risk in risks:
            rates = [row["parts"][part]["rates"].get(risk) for row in rows]
            if rates[0] is None:
                continue
            changes = [
                None if row["policy"] == "full" else (rate or {}).get("difference")
                for row, rate in zip(rows, rates, strict=True)
            ]
            texts = ["" if change is None else f"{100 * change:+.0f}" for change in changes]
            width = max(map(len, texts))
            cells = [
                "" if rate is None else f"{rate['value']:.2f} {text:>{width}}" for rate, text in zip(rates, texts, strict=True)
            ]
            name = part if risk == "wrong" else f"{part} {risk}"
            columns.append(Column(f"{name.replace('_', ' ')} n={rates[0]['n']}", cells))
    return columns


def _tiers(rows: Sequence[Row]) -> list[Column]:
    """What became of the system prompt: a column for each kind of tier."""
    kinds = sorted({bits for row in rows for bits in row["system_tiers"]}, key=lambda bits: (bits == "0", -_bits(bits), bits))
    return [
        _plain("evicted" if bits == "0" else bits, [row["system_tiers"].get(bits) for row in rows], _percent) for bits in kinds
    ]


def _print_parts(title: str, labels: Mapping[str, Sequence[str]], columns: Sequence[Column]) -> None:
    """All columns in their order, in as many tables as it takes."""
    out = console()
    while columns:
        table, shown, _ = fitted(title, labels, columns, out.width)
        out.print(table)
        columns = columns[max(1, len(shown)) :]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _bits(name: str) -> int:
    """The key bits of a tier's name: '16', 'k8v4'."""
    return int(name.removeprefix("k").split("v")[0])
