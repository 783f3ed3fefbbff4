"""Rates of risks against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mikv.plots.style import literal, look

Row = dict[str, Any]


def risk_lines(ax: Any, rows: Sequence[Row]) -> None:
    """One risk: its rate (with 95 % interval) against the counted size of the cache, a line per policy; the full cache's
    rate is a level to compare with. Rows: policy, size (per cent), rate, low, high (None where nothing is known)."""
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["size"])
        colour, marker = look(name)
        rate = [row["rate"] for row in mine]
        bounds = [(row["rate"], row["rate"]) if row["low"] is None else (row["low"], row["high"]) for row in mine]
        if name == "full":
            ax.axhline(rate[0], color=colour, linestyle="--", linewidth=1, label=literal(name))
            ax.axhspan(*bounds[0], color=colour, alpha=0.08, linewidth=0)
            continue
        ax.errorbar(
            [row["size"] for row in mine],
            rate,
            yerr=[
                [max(0, value - low) for value, (low, _) in zip(rate, bounds, strict=True)],
                [max(0, high - value) for value, (_, high) in zip(rate, bounds, strict=True)],
            ],
            fmt=f"{marker}-", color=colour, elinewidth=0.8, capsize=2, markersize=5, linewidth=1.2, label=literal(name),
            alpha=0.9,
        )  # fmt: skip
    ax.set_ylim(-0.03, 1.03)
    ax.grid(True, linewidth=0.3)


def risk_grid(rows: Sequence[Row], title: str) -> Any:
    """A figure with a panel of `risk_lines` for each `risk`, all on one scale. Rows also have n."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["risk"] for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(0.8 + 3 * columns, 1.4 + 2.3 * lines), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, name in zip(axes.flat, names, strict=False):
        mine = [row for row in rows if row["risk"] == name]
        risk_lines(ax, mine)
        ax.set_title(literal(f"{name.replace('_', ' ')} (n = {mine[0]['n']})"), fontsize=8)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel("cache size, % of the 16-bit cache (bytes counted from stored tensors)", fontsize=9)
    figure.supylabel("rate, lower is better (bars: 95 % interval)", fontsize=9)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8, title=title)
    return figure
