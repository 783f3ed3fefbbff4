"""Figures: functions of summary rows. Axes in, axes out; no file is read here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# One colour and marker a policy, the same in every figure (Okabe and Ito's palette, safe for colour-blind readers).
_STYLE = {
    "full": ("#000000", "*"),
    "mikv": ("#0072B2", "o"),
    "h2o": ("#D55E00", "s"),
    "streaming_llm": ("#E69F00", "D"),
    "uniform": ("#009E73", "^"),
    "random": ("#999999", "v"),
    "recent_only": ("#CC79A7", "P"),
}
_OTHER = ("#56B4E9", "X")


def curve(ax: Any, rows: Sequence[Row]) -> Any:
    """Score (with its 95 % interval) against the counted size of the cache, a point per policy."""
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["size_percent"])
        colour, marker = _STYLE.get(name, _OTHER)
        low, high = zip(*(row["ci95"] for row in mine), strict=True)
        value = [row["value"] for row in mine]
        ax.errorbar(
            [row["size_percent"] for row in mine],
            value,
            yerr=[
                [v - lower for v, lower in zip(value, low, strict=True)],
                [upper - v for v, upper in zip(value, high, strict=True)],
            ],
            fmt=marker, color=colour, ecolor=colour, elinewidth=0.8, capsize=2, markersize=7, label=name, alpha=0.9,
        )  # fmt: skip
    _annotate(ax, rows)
    ax.set_xlabel("cache size, % of the 16-bit cache (bytes counted from stored tensors)")
    ax.set_ylabel(f"{rows[0]['metric']} (bars: 95 % interval)")
    ax.set_xlim(0, 108)
    ax.set_ylim(-0.04, 1.08)
    ax.grid(True, linewidth=0.3)
    ax.legend(loc="lower right", frameon=True, fontsize=8)
    return ax


def _annotate(ax: Any, rows: Sequence[Row]) -> None:
    """Labels beside the points; those whose points lie close together are spread downwards."""
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["size_percent"], -row["value"])):
        x, y = row["size_percent"], row["value"]
        at = y + 0.025
        while any(abs(x - other) < 16 and abs(at - level) < 0.03 for other, level in placed):
            at -= 0.031
        placed.append((x, at))
        short = row["label"].replace(row["policy"], "").strip() or row["policy"]
        ax.annotate(short, (x, y), xytext=(x + 1.2, at), fontsize=6.5, color=_STYLE.get(row["policy"], _OTHER)[0])


def save_curve(file: Path, rows: Sequence[Row]) -> Path:
    """Draw `curve` into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5), dpi=150)
    curve(ax, rows)
    ax.set_title(f"{rows[0]['model']} on {rows[0]['task']}, n = {rows[0]['n']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
    return file
